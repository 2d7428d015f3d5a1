"""What sparse prefill attention does to a real model's answers, beside dense attention."""
