"""Training data: document sources, rows packed from them, and the loader that feeds the mesh."""
