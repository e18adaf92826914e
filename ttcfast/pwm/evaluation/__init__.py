"""How good a world model is: parameter parity, endpoint and imagination errors, distance to the simplex."""
