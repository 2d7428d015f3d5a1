"""How long short prompts wait for one another and for a long one."""
