"""The paper's prefill tables beside ours, as a page and plots, and a check that figures of the docs have records."""
