"""Training several methods and seeds, and comparing them."""
