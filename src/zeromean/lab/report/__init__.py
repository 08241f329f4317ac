"""The HTML page of a study."""

from zeromean.lab.report.page import build as build
from zeromean.lab.report.page import write_report as write_report
