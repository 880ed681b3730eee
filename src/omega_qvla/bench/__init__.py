"""How fast: the linears of released policies against other libraries, and whole policies against each other."""
