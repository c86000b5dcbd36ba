"""How the models that the project ships and measures were trained."""
