// Dark or light as the system is, before anything is painted.
"use strict";
{
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const follow = () => { document.documentElement.dataset.bsTheme = dark.matches ? "dark" : "light"; };
    follow();
    dark.addEventListener("change", follow);
}
