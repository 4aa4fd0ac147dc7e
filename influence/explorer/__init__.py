"""The explorer: one HTML page to look at an index with, for people who would rather see than compute."""

from influence.explorer.html_page import Page
from influence.explorer.page import page
from influence.explorer.statistics import Ends

__all__ = ["Ends", "Page", "page"]
