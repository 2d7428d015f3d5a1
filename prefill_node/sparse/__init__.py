"""Sparse attention of the prefill node: what each head leaves out, how that is chosen, checked and searched for."""
