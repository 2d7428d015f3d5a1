"""A roofline of a prefill: what a machine's rates for products, attention, memory and steps say that it will take."""
