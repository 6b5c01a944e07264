"""Settings shipped with the package: recipes and prompt templates."""
