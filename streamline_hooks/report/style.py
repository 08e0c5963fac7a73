"""How the page looks: one style sheet, for light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

from streamline_hooks.report.drawing import BREAK, NARROW, WIDE
from streamline_hooks.report.palette import DARK, LIGHT

STYLE_SHEET = f"""\
:root {{ color-scheme: light dark; {LIGHT.css()} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()} }} }}
*, *::before, *::after {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }}
body {{
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans",
    "DejaVu Sans", sans-serif;
}}
header, main, footer {{ max-width: 72rem; margin: 0 auto; padding: 0 1.5rem; }}
header {{ padding-top: 2.5rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }}
h2 {{ font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 0.75rem; }}
h3 {{ font-size: 1rem; margin: 0 0 0.75rem; }}
p {{ margin: 0.5rem 0; max-width: 46rem; }}
header p {{ color: var(--muted); }}
a {{ color: var(--after); }}
nav ul {{ list-style: none; margin: 1.25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.35rem 1.25rem; }}
nav a {{ text-decoration: none; display: inline-block; padding: 0.15rem 0; }}
nav a:hover {{ text-decoration: underline; }}
:focus-visible {{ outline: 2px solid var(--after); outline-offset: 2px; }}
.numbers {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 1px; margin: 1.5rem 0 0;
  background: var(--surface); border: 1px solid var(--line); border-radius: 0.5rem; overflow: hidden;
}}
.numbers > div {{ padding: 0.9rem 1rem; box-shadow: 0 0 0 1px var(--line); }}
.numbers dt {{ font-size: 0.8rem; color: var(--muted); }}
.numbers dd {{ margin: 0; }}
.numbers strong {{
  display: block; font-size: 1.5rem; line-height: 1.35; font-weight: 600; font-variant-numeric: tabular-nums;
}}
.numbers span {{ display: block; font-size: 0.8rem; line-height: 1.4; color: var(--muted); }}
figure, .table, .sample {{
  margin: 1rem 0; background: var(--surface); border: 1px solid var(--line); border-radius: 0.5rem; overflow: hidden;
}}
figure {{ padding: 1rem 1.25rem; }}
figure img {{ display: block; width: 100%; max-width: {WIDE}px; height: auto; margin: 0 auto; }}
figcaption {{ font-size: 0.875rem; color: var(--muted); margin-top: 0.6rem; max-width: 52rem; }}
figcaption strong {{ color: var(--ink); }}
.slim {{ width: fit-content; max-width: 100%; min-width: min(100%, 32rem); }}
.table h3 {{ margin: 0; padding: 0.75rem 1rem 0.35rem; font-size: 0.9rem; }}
.table p {{ margin: 0; padding: 0 1rem 0.35rem; font-size: 0.875rem; color: var(--muted); max-width: none; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.4rem 1rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }}
thead th {{ border-top: 0; color: var(--muted); font-weight: 600; white-space: normal; vertical-align: bottom; }}
th:first-child, .text {{ text-align: left; }}
tbody th {{ font-weight: 400; min-width: 8rem; max-width: 24rem; white-space: normal; }}
td.text {{ white-space: normal; min-width: 10rem; max-width: 40rem; overflow-wrap: anywhere; }}
.strong th, .strong td {{ font-weight: 600; }}
pre {{ margin: 0; padding: 0.9rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
code {{ font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
code span {{ display: inline-block; max-width: 100%; }}
.sample {{ padding: 1rem; }}
.beside {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem; }}
.beside h3 {{ font-size: 0.8rem; margin: 0 0 0.25rem; color: var(--muted); font-weight: 600; }}
.prompt {{ font-weight: 600; margin: 0 0 0.75rem; max-width: none; }}
.beside > div {{ border-left: 3px solid var(--before); padding-left: 0.75rem; min-width: 0; }}
.beside > div:last-child {{ border-left-color: var(--after); }}
.written {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.beside .written {{ margin: 0; }}
footer {{ padding-top: 2rem; padding-bottom: 3rem; font-size: 0.8rem; color: var(--muted); }}
@media (max-width: {BREAK - 1}px) {{
  figure img {{ max-width: {round(1.5 * NARROW)}px; margin: 0; }}
}}
@media (max-width: 40rem) {{
  header, main, footer {{ padding-left: 1rem; padding-right: 1rem; }}
  header {{ padding-top: 1.5rem; }}
  h1 {{ font-size: 1.5rem; }}
  figure {{ padding: 0.4rem 0 0.75rem; }}
  figcaption {{ padding: 0 0.75rem; }}
  .table h3, .table p {{ padding-left: 0.6rem; padding-right: 0.6rem; }}
  td.text, thead th.text {{ min-width: 6rem; }}
  thead th {{ min-width: 5rem; }}
  table {{ font-size: 0.85rem; }}
  th:first-child {{ position: sticky; left: 0; background: var(--surface); }}
  tbody th {{ min-width: 7rem; max-width: 9.5rem; overflow-wrap: anywhere; }}
  .numbers {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .numbers > div {{ padding: 0.7rem 0.75rem; }}
  .numbers strong {{ font-size: 1.25rem; }}
  th, td {{ padding: 0.4rem 0.6rem; }}
}}
@media print {{
  body {{ background: none; }}
  nav {{ display: none; }}
  figure, .sample, tr {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }}
}}
"""
