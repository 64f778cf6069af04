"""How many steps and seconds each optimizer needs to a target."""
