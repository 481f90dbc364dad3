"""Networks: their modules, parameters and cards."""
