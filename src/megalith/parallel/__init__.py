"""How a model is laid over ranks; the only folder that knows them."""
