"""Reports of runs from their files, without computing losses.

May import evaluation and the layers below it.

    records.py   what a run logged and measured: loss curves, savings, interventions
    charts.py    the charts of a report, drawn as SVG and PNG
    page.py      the HTML page and its CSV tables; templates in page/
    run_list.py  state, progress and best losses of the runs in a folder
"""
