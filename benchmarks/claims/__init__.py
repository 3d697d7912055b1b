"""The paper's claims (arXiv 2507.00447), measured at the size that one can afford; see README.md beside this file."""
