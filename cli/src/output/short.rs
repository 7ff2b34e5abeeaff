//! Short forms of ids for people: the shortest part that names one among those shown. The same
//! forms are accepted wherever an id is.

/// Length of a short form at least: few others begin or end alike.
const LEAST: usize = 8;

/// Beginning of all ids of sandboxes, and their length.
const PREFIX: &str = "pvelxc-";
const ID_LENGTH: usize = 33;

/// Part of an id that is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// End: ids of sandboxes begin with their time and end with random digits.
    End,
    /// Beginning: random exec ids are known by it.
    Beginning,
}

/// Shortens each id to what no other one of the list has.
pub fn shorten(ids: &[String], part: Part) -> Vec<String> {
    ids.iter().map(|id| short(id, ids, part)).collect()
}

fn short(id: &str, all: &[String], part: Part) -> String {
    // Names that people have chosen are not cut.
    let long = match part {
        Part::End => id.starts_with(PREFIX) && id.len() == ID_LENGTH,
        Part::Beginning => id.parse::<uuid::Uuid>().is_ok(),
    };
    if !long {
        return id.to_owned();
    }
    let take = |length: usize| match part {
        Part::End => id.get(id.len() - length..),
        Part::Beginning => id.get(..length),
    };
    let names_one = |short: &str| {
        let alike = |other: &String| match part {
            Part::End => other.ends_with(short),
            Part::Beginning => other.starts_with(short),
        };
        // Digits alone would be taken for a vmid.
        let is_number = part == Part::End && short.bytes().all(|byte| byte.is_ascii_digit());
        !is_number && !all.iter().filter(|other| other.as_str() != id).any(alike)
    };
    (LEAST..id.len()).filter_map(take).find(|short| names_one(short)).unwrap_or(id).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_shortened_to_what_is_unique_and_no_number() {
        let ids = [
            "pvelxc-01h455vb4peh5vsknk084sn02q",
            "pvelxc-01h455vb4pex5vsknj084sn02q",
            "pvelxc-01h455vb4pex5vsknk12345678",
            "mine",
        ];
        let ids = ids.map(str::to_owned);
        assert_eq!(shorten(&ids, Part::End), ["k084sn02q", "j084sn02q", "k12345678", "mine"]);
        let twice = [ids[0].clone(), ids[0].clone()];
        assert_eq!(shorten(&twice, Part::End), ["084sn02q", "084sn02q"]);
        let execs =
            ["0190a1b2-0000-4000-8000-000000000001", "0190a1b2-1000-4000-8000-000000000001"];
        let execs = [execs[0].to_owned(), execs[1].to_owned(), "build-7-of-the-night".into()];
        let shown = shorten(&execs, Part::Beginning);
        assert_eq!(shown, ["0190a1b2-0", "0190a1b2-1", "build-7-of-the-night"]);
    }
}
