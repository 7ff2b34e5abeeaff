//! Canonical form of what `nft -j list table` prints, to compare two listings. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    names::ALLOWED,
    render::{ARRIVALS, COUNTED, NAME_CONNECTIONS, QUESTIONS},
};

/// Parts of our tables (table, sets, chains, rules) by kind and name, without what differs from one
/// listing to the next. Empty for a text that is no listing.
pub(super) type Listing = BTreeMap<String, String>;

/// Parses a listing. `nft` numbers everything it makes, and has no order of elements.
pub(super) fn parse(text: &str) -> Listing {
    let parsed: Value = serde_json::from_str(text).unwrap_or_default();
    let mut listing = Listing::new();
    for object in parsed["nftables"].as_array().into_iter().flatten() {
        let Some((kind, part)) = object.as_object().and_then(|object| object.iter().next()) else {
            continue;
        };
        if kind == "metainfo" {
            continue;
        }
        let mut part = part.clone();
        canonical(&mut part);
        let moves = [COUNTED, ARRIVALS, ALLOWED, QUESTIONS, NAME_CONNECTIONS];
        if kind == "set" && moves.iter().any(|name| part["name"] == *name) {
            // The kernel adds to them and removes from them, or the resolver does.
            part["elem"].take();
        }
        let word = |key: &str| part[key].as_str().unwrap_or_default().to_owned();
        let name = if kind == "rule" { word("chain") } else { word("name") };
        let key = format!("{kind} {} {name}", word("family"));
        // Rules of a chain stay in their order.
        listing.entry(key).or_default().push_str(&part.to_string());
    }
    listing
}

/// Names the parts that are in one listing and not, or otherwise, in the other.
pub(super) fn differences(expected: &Listing, found: &Listing) -> Vec<String> {
    let keys = expected.keys().chain(found.keys().filter(|key| !expected.contains_key(*key)));
    keys.filter(|key| expected.get(*key) != found.get(*key)).cloned().collect()
}

fn canonical(part: &mut Value) {
    let Some(fields) = part.as_object_mut() else { return };
    for varies in ["handle", "index"] {
        fields.remove(varies);
    }
    if let Some(Value::Array(elements)) = fields.get_mut("elem") {
        elements.sort_by_cached_key(Value::to_string);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(elements: &str, handle: u32, drops: bool) -> Listing {
        let verdict = if drops { "drop" } else { "accept" };
        parse(&format!(
            r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6"}}}},
            {{"table": {{"family": "inet", "name": "pve_sandbox", "handle": {handle}}}}},
            {{"set": {{"family": "inet", "name": "addresses", "handle": {handle}, "elem": [{elements}]}}}},
            {{"rule": {{"family": "inet", "chain": "destination", "handle": 9, "expr": [{{"{verdict}": null}}]}}}}]}}"#
        ))
    }

    #[test]
    fn listings_differ_by_content_alone() {
        let one = listing(r#""10.0.0.1", "10.0.0.2""#, 1, true);
        assert_eq!(one.len(), 3);
        assert_eq!(differences(&one, &listing(r#""10.0.0.2", "10.0.0.1""#, 7, true)), [""; 0]);
        let fewer = differences(&one, &listing(r#""10.0.0.2""#, 1, true));
        assert_eq!(fewer, ["set inet addresses"]);
        let open = differences(&one, &listing(r#""10.0.0.1", "10.0.0.2""#, 1, false));
        assert_eq!(open, ["rule inet destination"]);
        assert_eq!(differences(&one, &parse("")).len(), 3);
    }
}
