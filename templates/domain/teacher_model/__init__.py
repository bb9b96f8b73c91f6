"""The network, and loading a trained one as teacher."""
