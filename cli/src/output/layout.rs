//! Columns of a table, and how wide each is: drops and shortens columns until a row fits.

use super::{short::Part, text};

/// Blanks between two columns.
const GAP: usize = 2;

/// Change that may be made to a column where the room is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// None.
    Keep,
    /// Its values are cut, to this width at least.
    Cut(usize),
    /// All its values show their short forms, of this width at most.
    Step(usize),
    /// Its values go on in lines of their own, of this width at least.
    Fold(usize),
}

/// Column of a table.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Heading.
    pub heading: &'static str,
    /// Name for `--columns` and `--sort`; empty: made from the heading.
    name: &'static str,
    /// Order in which columns are dropped, the highest first; 0 is never dropped.
    rank: u8,
    fit: Fit,
    /// Whether it is aligned to the right.
    right: bool,
    /// Whether it is shown with `-o wide` or by its name only.
    extra: bool,
    /// Part that is shown of a column of ids.
    ids: Option<Part>,
}

impl Column {
    /// Creates a column that is never dropped or shortened.
    pub const fn new(heading: &'static str) -> Self {
        let fit = Fit::Keep;
        Self { heading, name: "", rank: 0, fit, right: false, extra: false, ids: None }
    }

    /// Sets the name for `--columns` and `--sort`.
    #[must_use]
    pub const fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    /// Sets the order in which columns are dropped.
    #[must_use]
    pub const fn rank(self, rank: u8) -> Self {
        Self { rank, ..self }
    }

    /// Sets what may be done to it.
    #[must_use]
    pub const fn fit(self, fit: Fit) -> Self {
        Self { fit, ..self }
    }

    /// Aligns it to the right.
    #[must_use]
    pub const fn right(self) -> Self {
        Self { right: true, ..self }
    }

    /// Shows it with `-o wide` or by its name only.
    #[must_use]
    pub const fn extra(self) -> Self {
        Self { extra: true, ..self }
    }

    /// Marks it as a column of ids, of which people see a part.
    #[must_use]
    pub const fn ids(self, part: Part) -> Self {
        Self { ids: Some(part), ..self }
    }

    /// Name for `--columns` and `--sort`, such as `exec-id`.
    pub fn name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.to_owned();
        }
        let heading = self.heading.to_lowercase();
        let words = heading.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("-")
    }

    /// Whether it is aligned to the right.
    pub(super) fn is_right(&self) -> bool {
        self.right
    }

    /// Whether it is hidden unless it is asked for.
    pub(super) fn is_extra(&self) -> bool {
        self.extra
    }

    /// Whether its values go on in further lines.
    pub(super) fn folds(&self) -> bool {
        matches!(self.fit, Fit::Fold(_))
    }

    /// Part that is shown of its ids.
    pub(super) fn id_part(&self) -> Option<Part> {
        self.ids
    }

    /// Width below which it does not go, for values of this width.
    fn least(&self, natural: usize) -> usize {
        match self.fit {
            Fit::Keep => natural,
            Fit::Cut(least) | Fit::Step(least) | Fit::Fold(least) => natural.min(least),
        }
        .max(text::width(self.heading).min(natural))
    }
}

/// A column that is shown: its place among all of them, and its width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// Place of the column in the table.
    pub at: usize,
    /// Width of its values.
    pub width: usize,
}

/// Chooses columns and their widths so that a row takes at most `room` columns of the terminal.
/// `naturals` are the widths of the whole values. Columns that were `named` are never dropped.
pub fn fit(
    columns: &[Column],
    chosen: &[usize],
    naturals: &[usize],
    room: usize,
    named: bool,
) -> Vec<Shown> {
    let least = |at: usize| columns[at].least(naturals[at]);
    let mut chosen = chosen.to_vec();
    let need = |chosen: &[usize]| {
        let gaps = GAP * chosen.len().saturating_sub(1);
        chosen.iter().map(|&at| least(at)).sum::<usize>() + gaps
    };
    while !named && need(&chosen) > room {
        let last = chosen.iter().enumerate().max_by_key(|(place, at)| (columns[**at].rank, *place));
        match last {
            Some((place, &at)) if columns[at].rank > 0 => drop(chosen.remove(place)),
            _ => break,
        }
    }
    let mut shown: Vec<_> = chosen.iter().map(|&at| Shown { at, width: least(at) }).collect();
    grow(columns, naturals, &mut shown, room.saturating_sub(need(&chosen)));
    squeeze(&mut shown, room);
    shown
}

/// Gives the room that is left to the columns, the most important first.
fn grow(columns: &[Column], naturals: &[usize], shown: &mut [Shown], mut left: usize) {
    let mut order: Vec<_> = (0..shown.len()).collect();
    order.sort_by_key(|&place| columns[shown[place].at].rank);
    for place in order {
        let Shown { at, width } = shown[place];
        let more = naturals[at].saturating_sub(width);
        let more = match columns[at].fit {
            // A part of the way would show the short forms all the same.
            Fit::Step(_) if more > left => 0,
            Fit::Step(_) | Fit::Keep | Fit::Cut(_) | Fit::Fold(_) => more.min(left),
        };
        shown[place].width += more;
        left -= more;
    }
}

/// Narrows the widest columns where the least widths do not fit.
fn squeeze(shown: &mut [Shown], room: usize) {
    let gaps = GAP * shown.len().saturating_sub(1);
    let mut over = (shown.iter().map(|one| one.width).sum::<usize>() + gaps).saturating_sub(room);
    while over > 0 {
        let Some(widest) = shown.iter_mut().max_by_key(|one| one.width) else { return };
        if widest.width <= 1 {
            return;
        }
        widest.width -= 1;
        over -= 1;
    }
}

/// Joins the cells of a line.
pub fn join(cells: &[String]) -> String {
    cells.join(&" ".repeat(GAP)).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COLUMNS: &[Column] = &[
        Column::new("ID"),
        Column::new("NODE").rank(2).fit(Fit::Cut(4)),
        Column::new("STATE").rank(1).fit(Fit::Step(7)),
        Column::new("NOTE").rank(3).fit(Fit::Fold(6)),
    ];

    #[test]
    fn columns_are_dropped_by_rank_and_grow_by_rank() {
        let widths = |room, named| {
            let naturals = [8, 10, 12, 30];
            let shown = fit(COLUMNS, &[0, 1, 2, 3], &naturals, room, named);
            shown.into_iter().map(|one| (one.at, one.width)).collect::<Vec<_>>()
        };
        assert_eq!(widths(100, false), [(0, 8), (1, 10), (2, 12), (3, 30)]);
        assert_eq!(widths(31, false), [(0, 8), (1, 4), (2, 7), (3, 6)]);
        assert_eq!(widths(37, false), [(0, 8), (1, 5), (2, 12), (3, 6)]);
        assert_eq!(widths(30, false), [(0, 8), (1, 6), (2, 12)]);
        assert_eq!(widths(17, false), [(0, 8), (2, 7)]);
        assert_eq!(widths(6, false), [(0, 6)]);
        assert_eq!(widths(20, true).len(), 4, "what was asked for by name is shown");
    }

    proptest! {
        #[test]
        fn row_never_takes_more_than_the_room(
            naturals in prop::collection::vec(0_usize..60, 4),
            room in 12_usize..120,
            named in any::<bool>(),
        ) {
            let shown = fit(COLUMNS, &[0, 1, 2, 3], &naturals, room, named);
            let total = shown.iter().map(|one| one.width).sum::<usize>();
            prop_assert!(total + GAP * shown.len().saturating_sub(1) <= room);
        }
    }

    #[test]
    fn names_of_columns_are_made_from_their_headings() {
        assert_eq!(Column::new("EXEC ID").name(), "exec-id");
        assert_eq!(Column::new("CPU %").name(), "cpu");
        assert_eq!(Column::new("PSI").named("pressure").name(), "pressure");
    }
}
