"""Where moegraft stands in the host's forward pass: experts, linear maps, routers, saved modules; the call itself."""
