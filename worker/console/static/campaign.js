// A campaign: its live figures and stock bars, every five seconds.
"use strict";
{
    const page = document.getElementById("campaign");
    follow(page.dataset.live, 5000, ({ figures, bars }) => {
        for (const it of page.querySelectorAll("[data-figure]")) it.textContent = figures[it.dataset.figure] || "–";
        for (const it of page.querySelectorAll("[data-bar]")) it.style.width = `${bars[it.dataset.bar]}%`;
    });
}
