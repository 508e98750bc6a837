"""What measures and shows the library: tables, benches, statistics, figures, the page. Nothing of it is imported."""
