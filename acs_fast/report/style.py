"""The look of the pages: two colour schemes, one column, print."""

from __future__ import annotations

from string import Template

# series --c0 to --c6; heat --h0 (low) to --h8 (high), with the text on it --t0 to --t8
LIGHT = """
  --paper: #ffffff; --raised: #f6f7f9; --ink: #1b1e24; --muted: #59616d; --rule: #dfe3e8;
  --accent: #1f5fd0; --note: #7a4b00; --note-paper: #fff6e3;
  --c0: #1f5fd0; --c1: #b85300; --c2: #12775a; --c3: #7d45bd; --c4: #b93260; --c5: #5c6672; --c6: #0b7285;
  --h0: #f3f7fd; --h1: #e2ecfa; --h2: #ccdef6; --h3: #b1ccf1; --h4: #92b6ea;
  --h5: #4a7fd3; --h6: #2f66bf; --h7: #1d4f9f; --h8: #123a7a;
  --t0: #1b1e24; --t1: #1b1e24; --t2: #1b1e24; --t3: #1b1e24; --t4: #1b1e24;
  --t5: #050d1c; --t6: #ffffff; --t7: #ffffff; --t8: #ffffff;
"""
DARK = """
  --paper: #14171c; --raised: #1d2128; --ink: #e8eaee; --muted: #a5adb9; --rule: #343a44;
  --accent: #86aeff; --note: #f2c879; --note-paper: #2c2415;
  --c0: #86aeff; --c1: #f2a65e; --c2: #63cba2; --c3: #c3a2f4; --c4: #f58fb0; --c5: #a9b2bf; --c6: #62c6d9;
  --h0: #1a2130; --h1: #1f2c45; --h2: #24385c; --h3: #2a4676; --h4: #305592;
  --h5: #6f9fe8; --h6: #8ab3f0; --h7: #a9c8f6; --h8: #cadffb;
  --t0: #e8eaee; --t1: #e8eaee; --t2: #e8eaee; --t3: #e8eaee; --t4: #ffffff;
  --t5: #0b1220; --t6: #0b1220; --t7: #0b1220; --t8: #0b1220;
"""
RULES = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 70rem; margin: 0 auto;
  padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; letter-spacing: -.01em }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.4rem); margin: 0 0 .6rem }
h2 { font-size: 1.4rem; margin: 0 0 .75rem }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .5rem }
section { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--rule) }
p, li, dd, figcaption, summary { overflow-wrap: anywhere }
p { margin: 0 0 1rem; max-width: 46rem }
.lead { font-size: 1.1rem; color: var(--muted) }
a { color: var(--accent) }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1.5rem 0 0;
  list-style: none }
nav a { text-decoration: none }
nav a:hover { text-decoration: underline }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace }
code { overflow-wrap: anywhere }
code span { display: inline-block; max-width: 100%; text-indent: 0 }
pre { margin: .5rem 0 .75rem; padding: .75rem 1rem; background: var(--raised); border-radius: .5rem;
  overflow-x: auto }
pre code { display: block; font-size: 1em; white-space: pre-wrap; padding-left: 2ch; text-indent: -2ch }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.75rem 0 0 }
.facts dt, .fine, figcaption, .caption { color: var(--muted); font-size: .875rem }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600 }
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 1rem }
table { border-collapse: collapse; font-size: .9375rem }
.caption { margin: .5rem 0 .1rem }
th, td { padding: .4rem 1.1rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top;
  white-space: nowrap }
th:last-child, td:last-child { padding-right: 0 }
th[scope=row], th:first-child, .text { text-align: left }
td.text, th[scope=row] { white-space: normal; min-width: 6rem; max-width: 22rem }
thead th { color: var(--muted); font-weight: 500; font-size: .875rem; vertical-align: bottom }
tbody th { font-weight: 500 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: .5rem 3rem;
  align-items: start }
.pair > * { min-width: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr));
  gap: 1.25rem 2.5rem; align-items: start }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
figure { margin: 0 0 1rem; max-width: 100%; min-width: 0 }
figcaption { max-width: 46rem; margin-top: .35rem }
.title { margin: 0 0 .35rem; font-size: .9375rem }
.plots figcaption { max-width: 26rem }
svg { display: block; max-width: 100%; height: auto; overflow: visible }
svg * { stroke-linejoin: round; stroke-linecap: butt }
.plot { font-family: inherit }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.25rem; padding: 0; margin: .25rem 0 .5rem;
  list-style: none;
  font-size: .875rem }
.legend li { display: flex; align-items: center; gap: .45rem; min-width: 0 }
.legend svg { flex: none }
details { margin: .5rem 0 1rem; max-width: 100% }
summary { cursor: pointer; color: var(--accent) }
.how > summary { font-size: .875rem }
.how p { font-size: .875rem; color: var(--muted) }
.missing { padding: .7rem 1rem; border-radius: .5rem; max-width: none }
.missing { background: var(--raised); color: var(--muted) }
.missing code { color: var(--ink) }
.note { border-left: 3px solid var(--note); padding-left: .9rem; margin: 0 0 1.25rem; color: var(--note);
  font-size: .9375rem; max-width: 46rem }
.warn { background: var(--note-paper); padding: .7rem 1rem; border-radius: .5rem }
.note ul { margin: .25rem 0 0; padding-left: 1.2rem }
.sheet > summary { list-style: none; cursor: zoom-in; overflow-x: auto; border-radius: .5rem;
  background: #fff;
  padding: .5rem; width: fit-content; max-width: 100%; border: 1px solid var(--rule) }
.sheet > summary::-webkit-details-marker { display: none }
.sheet[open] > summary { cursor: zoom-out; overflow: auto; max-height: 90vh; max-height: 90dvh }
.sheet img { display: block; max-width: 100%; height: auto }
.sheet[open] img { max-width: none; width: var(--large) }
.pixels { image-rendering: pixelated }
footer { margin-top: 3rem; color: var(--muted); font-size: .875rem }
@media (max-width: 30rem) { th, td { padding-right: .8rem } .facts { gap: .75rem 1.75rem } }
@media print {
  body { font-size: 10pt } main { max-width: none; padding: 0 }
  section { margin-top: 1.5rem; padding-top: 1rem }
  nav, .how > summary::marker { display: none }
  figure, tr, .facts { break-inside: avoid } h2, h3 { break-after: avoid }
  .scroll { overflow: visible } th, td { white-space: normal; font-size: 8.5pt; padding-right: .6rem }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
}
"""
STYLE = (
    Template(
        ":root { color-scheme: light dark;$light}\n"
        "@media screen and (prefers-color-scheme: dark) { :root {$dark} }\n"
    ).substitute(light=LIGHT, dark=DARK)
    + RULES
)
