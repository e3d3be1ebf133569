"""The frame of the HTML page: policy, style and the little script. Nothing in it comes from a run."""

from __future__ import annotations

from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

# Eight colours that differ in lightness as well as in hue (after Okabe and Ito, "Color Universal Design"), each at least
# 3:1 against its background, in two sets: for light paper and for dark.
STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1b2027;--soft:#59626e;--rule:#e2e0d9;--accent:#0b6e5f;
--good:#0b6e5f;--bad:#b3370f;--open:#8a6100;--wash:#e6f2ef;--heat:14,118,168;
--c0:#0068a8;--c1:#c9500a;--c2:#00805f;--c3:#b0478a;--c4:#8a6a00;--c5:#2f8fc4;--c6:#5b4bb8;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--paper:#12161b;--card:#1a2027;--ink:#e8eaed;--soft:#9fa9b5;--rule:#2d353f;
--accent:#52c7b0;--good:#52c7b0;--bad:#ff9068;--open:#e9bb4a;--wash:#17302c;--heat:70,160,215;
--c0:#58aef0;--c1:#ff8f4f;--c2:#35c79a;--c3:#e694c6;--c4:#e3b93c;--c5:#a3d8f7;--c6:#a99bff;--c7:#aab2bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header.top,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header.top{padding-top:36px}
.brand{color:var(--soft);font-size:13px;letter-spacing:.08em;text-transform:uppercase;margin:0}
h1{font-size:clamp(26px,4vw,40px);line-height:1.15;margin:.25em 0 .35em;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:20px;margin:0 0 4px;letter-spacing:-.005em}
h3{font-size:14px;margin:0 0 6px;color:var(--soft);font-weight:600}
p{margin:.4em 0}p.note,figcaption{color:var(--soft);font-size:14px;max-width:76ch}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin:20px 0}
.mark{display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.35em;background:var(--open)}
.yes .mark{background:var(--good)}.no .mark{background:var(--bad)}
.lead{font-size:18px;max-width:70ch}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px 26px;margin:22px 0 6px;padding:0}
.facts div{border-top:2px solid var(--rule);padding-top:8px}
.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;font-size:22px;font-variant-numeric:tabular-nums;
line-height:1.3}
.facts small{display:block;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:10px -4px 0;padding:0 4px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}td,tbody th{vertical-align:top}
th:first-child,td.word,th.word{text-align:left}td.wrap{white-space:normal;min-width:180px;text-align:left;color:var(--soft)}
td small{display:block;color:var(--soft);font-size:12.5px;white-space:normal;max-width:220px;margin-top:2px}
tbody th{color:var(--ink);font-weight:600;text-align:left}tbody tr:last-child>*{border-bottom:0}
tr.chosen>*{background:var(--wash)}th button{all:unset;cursor:pointer;color:inherit;font:inherit}
th button:focus-visible,label:focus-within,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px;
border-radius:3px}
th button::after{content:" \\2195";opacity:.35}th[aria-sort=ascending] button::after{content:" \\2191";opacity:1}
th[aria-sort=descending] button::after{content:" \\2193";opacity:1}
.state{display:inline-block;padding:0 8px;border-radius:99px;font-size:12.5px;border:1px solid currentColor}
.state.finished{color:var(--good)}.state.stopped{color:var(--open)}.state.evicted,.state.failed{color:var(--bad)}
.state.training,.state.waiting{color:var(--soft)}
.heat td{background:rgba(var(--heat),var(--h,0))}.heat td.best{font-weight:700}.heat td.best::after{content:" \\25CF";
font-size:9px}
.heat td.best{padding-right:4px}.heat tbody tr.group>*{border-top:2px solid var(--rule)}
.toggles{display:flex;flex-wrap:wrap;gap:6px 14px;margin:12px 0 8px;padding:0;border:0;font-size:13.5px}
.toggles label{cursor:pointer;display:inline-flex;align-items:center;gap:6px}.toggles input{accent-color:var(--accent);
margin:0}
.swatch{width:16px;height:4px;border-radius:2px;background:var(--c)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:18px}
figure{margin:0;position:relative}svg.chart{width:100%;height:auto;display:block;overflow:visible}
svg text{fill:var(--ink);font:12px system-ui,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
svg .tick,svg .axis,svg .faint{fill:var(--soft);font-size:11px}svg .grid{stroke:var(--rule)}
.line polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.line circle{fill:var(--c)}
svg text.end{fill:var(--c);font-size:11px;font-weight:600}svg text.level-label{font-size:11px;fill:var(--soft)}
.level{stroke:var(--soft);stroke-dasharray:2 4;stroke-width:1.5}.level.merge{stroke:var(--ink);stroke-dasharray:7 3}
svg text.level-label.merge{fill:var(--ink);font-weight:700}
.d1 polyline{stroke-dasharray:7 4}.d2 polyline{stroke-dasharray:2 4}.d3 polyline{stroke-dasharray:9 3 2 3}
.cursor{stroke:var(--soft);stroke-dasharray:2 3;visibility:hidden}.spot{fill:var(--ink);stroke:var(--card);stroke-width:2;
visibility:hidden}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--paper);font-size:12.5px;padding:4px 8px;
border-radius:6px;
white-space:nowrap;transform:translate(-50%,-135%);visibility:hidden}
.estimate line{stroke:var(--soft);stroke-width:2}.estimate circle{fill:var(--soft)}
.estimate .caps,.estimate .beyond{stroke:var(--soft);stroke-width:1.5;fill:none}
.estimate.winner line,.estimate.winner .caps{stroke:var(--c0)}.estimate.winner circle{fill:var(--c0)}
.estimate.chosen line,.estimate.chosen .caps{stroke:var(--accent);stroke-width:3}.estimate.chosen circle{fill:var(--accent)}
svg .estimate.chosen .name,svg .estimate.chosen .value{font-weight:700}.estimate .faint{font-weight:400}
svg.pull .point circle{fill:var(--c0)}svg.pull .point text{font-size:11px}
.findings{font-size:14.5px;padding-left:20px;max-width:90ch}.findings li{margin:3px 0}
.mixes{display:grid;grid-template-columns:minmax(110px,max-content) max-content 1fr;gap:3px 12px;align-items:center;
font-size:13.5px;margin-top:12px}
.mixes .who{font-weight:600;overflow-wrap:anywhere}.mixes .kind{color:var(--soft);font-size:12.5px}
.mixes .gap{grid-column:1/-1;height:7px}
.bar{display:flex;height:17px;border-radius:4px;overflow:hidden;background:var(--rule)}
.part{background:var(--c);color:#fff;font-size:11px;line-height:17px;text-align:center;overflow:hidden;
box-shadow:inset -1px 0 var(--card)}
@media(prefers-color-scheme:dark){.part{color:#101418}}
.h1{background-image:repeating-linear-gradient(45deg,transparent 0 4px,rgba(128,128,128,.45) 4px 7px)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;margin-top:10px}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend i{width:12px;height:12px;border-radius:3px;
background:var(--c)}
.share{display:inline-block;height:8px;border-radius:2px;background:var(--accent);vertical-align:middle;margin-right:6px}
.flow{display:flex;flex-wrap:wrap;align-items:center;gap:10px;margin-top:12px}
.flow .node{border:1px solid var(--rule);border-radius:9px;padding:8px 12px;font-size:14px;min-width:104px}
.flow .node b{display:block}.flow code{font-size:12px;color:var(--soft)}.flow .arrow{color:var(--soft)}
.flow .node.final{border-color:var(--accent);background:var(--wash)}
pre{background:var(--paper);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:13px;
line-height:1.5}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin-top:12px}summary{cursor:pointer;color:var(--soft);font-size:14px}
footer{color:var(--soft);font-size:13px;padding-bottom:40px}
@media(max-width:640px){section{padding:16px 14px}main,header.top,footer{padding-left:12px;padding-right:12px}
.mixes{grid-template-columns:max-content 1fr}.mixes .who{grid-column:1/-1}}
@media print{section{break-inside:avoid}.toggles{display:none}}
""" + "".join(f".s{k},.b{k}{{--c:var(--c{k})}}" for k in range(8))

# Values under the pointer, and tables that sort. All that it shows is in the page already.
SCRIPT = """
'use strict';
for (const svg of document.querySelectorAll('svg[data-x]')) {
  const [px0, px1, x0, x1] = svg.dataset.x.split(',').map(Number), [py0, py1, y0, y1] = svg.dataset.y.split(',').map(Number);
  const tip = svg.parentNode.appendChild(document.createElement('div'));
  tip.className = 'tip';
  const cursor = svg.querySelector('.cursor'), spot = svg.querySelector('.spot');
  const show = v => { for (const el of [tip, cursor, spot]) el.style.visibility = v; };
  svg.addEventListener('pointerleave', () => show('hidden'));
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const mx = (event.clientX - box.left) * scale, my = (event.clientY - box.top) * scale;
    let best = null;
    for (const line of svg.querySelectorAll('.line')) {
      if (getComputedStyle(line).display === 'none') continue;
      for (const p of line.querySelector('polyline').points) {
        const d = (p.x - mx) ** 2 + (p.y - my) ** 2;
        if (p.y >= py1 - 4 && (!best || d < best.d)) best = {d, x: p.x, y: p.y, label: line.dataset.label};
      }
    }
    if (!best) return show('hidden');
    const tokens = Math.round(x0 + (best.x - px0) / (px1 - px0) * (x1 - x0));
    const loss = y0 + (best.y - py0) / (py1 - py0) * (y1 - y0);
    tip.textContent = `${best.label}: ${loss.toFixed(3)} after ${tokens.toLocaleString('en')} tokens`;
    const half = tip.offsetWidth / 2;
    tip.style.left = Math.min(Math.max(best.x / scale, half), box.width - half) + 'px';
    tip.style.top = best.y / scale + 'px';
    cursor.setAttribute('x1', best.x); cursor.setAttribute('x2', best.x);
    cursor.setAttribute('y1', py1); cursor.setAttribute('y2', py0);
    spot.setAttribute('cx', best.x); spot.setAttribute('cy', best.y);
    show('visible');
  });
}
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((th, column) => {
    const button = document.createElement('button');
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener('click', () => {
      const down = th.getAttribute('aria-sort') === 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const missing = row => key(row) === '';
      const number = [...body.rows].every(row => missing(row) || !isNaN(key(row)));
      body.append(...[...body.rows].sort((a, b) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        return (number ? key(a) - key(b) : key(a).localeCompare(key(b))) * (down ? -1 : 1);
      }));
    });
  });
}
"""


def whole_page(title: str, header: str, sections: list[str], footer: str, extra_style: str) -> str:
    """One HTML document. `title` is escaped here, everything else must be markup already."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{extra_style}</style>\n</head>\n<body>\n"
        f'<header class="top">{header}</header>\n<main>\n{body}\n</main>\n<footer>{footer}</footer>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
