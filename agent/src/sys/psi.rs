//! Pressure stall information of the kernel.

/// Tasks that were stalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stalled {
    /// At least one task.
    Some,
    /// All tasks at once.
    Full,
}

/// Share of the last 10 s in which these tasks were stalled, percent; 0 where the kernel does not
/// report it.
pub fn avg10(text: &str, stalled: Stalled) -> f64 {
    let start = match stalled {
        Stalled::Some => "some ",
        Stalled::Full => "full ",
    };
    let line = text.lines().find_map(|line| line.strip_prefix(start));
    let value = line.and_then(|line| line.split(' ').find_map(|word| word.strip_prefix("avg10=")));
    value.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}
