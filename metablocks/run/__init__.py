"""Training and evaluation of recipes: plain loops over the contract."""
