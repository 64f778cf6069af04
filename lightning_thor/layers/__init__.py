"""What a layer is: its kind, its rows and its gradient as a matrix, which layers a model has, and hooks that pair
inputs with gradients. Nothing here knows a factor."""
