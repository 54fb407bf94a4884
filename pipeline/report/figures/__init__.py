"""plotly's figures of studies, from the table of their trials; `figure.layout.meta` is a figure's caption.

They fit a page of 360 pixels and one of 1,400: names stand above their rows and not beside them. Colours are those of
Okabe and Ito (2008), which the colour-blind tell apart, on a ground of any shade. Names from users are cut and escaped:
plotly takes some for HTML.
"""
