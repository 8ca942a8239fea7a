// A replay under way: its numbers twice a second; when it ends, the page is loaded again.
"use strict";
{
    const page = document.getElementById("replay");
    if (page.dataset.live) {
        follow(page.dataset.live, 500, (live) => {
            for (const figure of page.querySelectorAll("[data-figure]")) {
                figure.textContent = live[figure.dataset.figure] || "–";
            }
            for (const part of page.querySelectorAll("[data-share]")) part.style.width = `${live.shares[part.dataset.share]}%`;
            if (live.is_running && !live.has_died) return true;
            location.reload();
            return false;
        });
    }
}
