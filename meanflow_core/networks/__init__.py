"""Network architectures: modules on (value, tangent) pairs."""
