"""An experts layer for a single token: no routing, no matrix unit, two launches (four with adapters)."""
