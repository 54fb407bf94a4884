"""Studies as tables, figures and one page: what was tried, what came of it, and what the noise allows to say."""
