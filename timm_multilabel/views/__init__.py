"""An image -> views of it: what is random of them, and three ways to make them."""
