"""From a module to a pure loss function, and what such a function can say of itself."""
