"""Run commands and draw what they print as an animated SVG: `python docs/record.py OUT.svg 'COMMAND' ['COMMAND' ...]`.

Lines appear in the order in which they were printed, within `SECONDS`; readers who want no motion see the last frame.
"""
import html
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 14.0
COLUMNS, FONT, LEADING = 112, 13, 19


def record(commands: list[str]) -> tuple[list[tuple[float, str]], float]:
    """What the commands print, each line with the second at which it came, and how long all took."""
    lines, start = [], time.monotonic()
    for command in commands:
        lines.append((time.monotonic() - start, f'$ {command}'))
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - start, line.rstrip('\n').split('\r')[-1]))
        if process.wait():
            sys.exit(f'{command}: exit status {process.returncode}')
    return lines, time.monotonic() - start


def draw(lines: list[tuple[float, str]], took: float) -> str:
    """The SVG of lines."""
    parts = [(at, part) for at, line in lines
             for part in ([line[i:i + COLUMNS] for i in range(0, len(line), COLUMNS)] or [''])]
    width, height = round(COLUMNS * FONT * 0.602) + 32, len(parts) * LEADING + 40
    rows = ''.join(
        f'<text x="16" y="{28 + LEADING * number}" class="{"c" if part.startswith("$ ") else "o"}" '
        f'style="animation-delay:{SECONDS * at / took:.2f}s" xml:space="preserve">{html.escape(part)}</text>\n'
        for number, (at, part) in enumerate(parts))
    return f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>A terminal: what the commands print, recorded in {took:.0f} seconds and shown in {SECONDS:.0f}</title>
<style>
text {{ font: {FONT}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.o {{ fill: #d6deeb; }} .c {{ fill: #7fdbca; font-weight: bold; }}
@media (prefers-reduced-motion: no-preference) {{ text {{ opacity: 0; animation: in 0.2s forwards; }} }}
@keyframes in {{ to {{ opacity: 1; }} }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#011627"/>
{rows}</svg>
'''


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(draw(*record(sys.argv[2:])), encoding='utf-8')
