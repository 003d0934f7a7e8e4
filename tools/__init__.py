"""Tools of the project itself; users need none of them."""
