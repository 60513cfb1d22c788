"""Linear layers in 8 or 4 bits a weight: how they are described, made from others, and what models do with them."""
