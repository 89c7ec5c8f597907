try {
  const theme = localStorage.getItem("twofold-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a page opened as a file may have no storage */ }
