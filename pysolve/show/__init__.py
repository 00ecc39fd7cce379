"""What a user sees: tables and pictures.

tables       rows of text for a terminal, Markdown and HTML
page         a report as one HTML file
plots        the public pictures; curves prepares what they draw, drawing is what all share
figures      the demonstration's
"""
