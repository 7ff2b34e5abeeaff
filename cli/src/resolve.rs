//! From what a person types to the name that the API takes: `@current`, `@last`, and the beginning or
//! the end of an id. A whole id and a vmid need no call.

use std::str::FromStr;

use proto::{id::SandboxRef, sandbox::v1::Sandbox};

use crate::{
    client::{self, Controller},
    failure::Failure,
    state::{Slot, State},
};

/// Characters of a part of an id at least.
const PART_MIN: usize = 3;
/// Candidates that an error lists at most.
const LISTED_MAX: usize = 10;

/// Way in which a sandbox is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As the API takes it, or refuses it.
    Plain,
    /// Remembered by this program.
    Remembered(Slot),
    /// Begins with `@` and is nothing that is known.
    Unknown,
    /// May be a part of an id.
    Part,
}

fn form(text: &str) -> Form {
    if let Some(name) = text.strip_prefix('@') {
        return match name {
            "current" => Form::Remembered(Slot::Current),
            "last" => Form::Remembered(Slot::Last),
            _ => Form::Unknown,
        };
    }
    let digits = text.strip_prefix("pvelxc-").unwrap_or(text);
    let like_an_id = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'v'));
    let is_part = like_an_id && text.len() >= PART_MIN && SandboxRef::from_str(text).is_err();
    // A number is a vmid, also one that is out of range.
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_part && !is_number { Form::Part } else { Form::Plain }
}

/// Whether the text must be resolved before the API can take it.
pub fn is_needed(text: &str) -> bool {
    form(text) != Form::Plain
}

/// Name of the sandbox as the API takes it. What is no part of any id is returned as it is, and the
/// API says what is wrong with it.
///
/// # Errors
/// When several sandboxes are meant, nothing is remembered, or the list cannot be read.
pub async fn resolve(controller: &Controller, text: &str) -> Result<String, Failure> {
    match form(text) {
        Form::Plain => Ok(text.to_owned()),
        Form::Remembered(slot) => remembered(&controller.state, slot),
        Form::Unknown => Err(Failure::usage(
            format!("there is no {text}"),
            "there are @current, which `sandboxctl use ID` sets, and @last, the last created one",
        )),
        Form::Part => {
            // The living first: a part names one of them rather than one that has ended.
            for ended in [false, true] {
                if let Some(id) = choose(text, &client::list(controller, ended).await?)? {
                    return Ok(id);
                }
            }
            Ok(text.to_owned())
        }
    }
}

fn remembered(state: &State, slot: Slot) -> Result<String, Failure> {
    let how = match slot {
        Slot::Current => "`sandboxctl use ID` chooses one for this controller",
        Slot::Last => "`sandboxctl create` and `run` remember what they create on this controller",
    };
    let none = || Failure::usage(format!("there is no @{} sandbox yet", slot.name()), how);
    state.get(slot)?.ok_or_else(none)
}

/// Finds the only sandbox whose id begins or ends with the text; one with this very name wins.
fn choose(text: &str, sandboxes: &[Sandbox]) -> Result<Option<String>, Failure> {
    if let Some(of_name) = sandboxes.iter().find(|sandbox| sandbox.name == text) {
        return Ok(Some(of_name.id.clone()));
    }
    let named = |sandbox: &&Sandbox| {
        let id = sandbox.id.as_str();
        let digits = id.split_once('-').map_or("", |(_, digits)| digits);
        id.starts_with(text) || digits.starts_with(text) || digits.ends_with(text)
    };
    let mut found: Vec<_> = sandboxes.iter().filter(named).collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found.dedup_by(|a, b| a.id == b.id);
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(only.id.clone())),
        several => {
            let mut listed: Vec<_> =
                several.iter().take(LISTED_MAX).map(|sandbox| sandbox.id.clone()).collect();
            if several.len() > LISTED_MAX {
                listed.push("...".into());
            }
            Err(Failure::usage(
                format!("{} sandboxes are named by {text}: {}", several.len(), listed.join(", ")),
                "give more of the id, from its beginning or its end",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "pvelxc-01h455vb4peh5vsknk084sn02q";
    const B: &str = "pvelxc-01h455vb4pex5vsknk084sn03q";

    fn known(ids: &[&str]) -> Vec<Sandbox> {
        ids.iter().map(|id| Sandbox { id: (*id).into(), ..Sandbox::default() }).collect()
    }

    #[test]
    fn whole_ids_and_numbers_need_no_call() {
        for plain in
            [A, "100001", "99", "0100", "pve_lxc_100001", "cmux-100001", "my-web", "x", "02"]
        {
            assert!(!is_needed(plain), "{plain}");
        }
        for part in ["02q", "01h455", "pvelxc-01h4", "@current", "@last", "@x"] {
            assert!(is_needed(part), "{part}");
        }
    }

    #[test]
    fn parts_name_one_sandbox_from_either_end() {
        let both = known(&[A, B]);
        for part in ["02q", "n02q", "84sn02q"] {
            assert_eq!(choose(part, &both).expect("one").as_deref(), Some(A), "{part}");
        }
        assert_eq!(choose("01h4", &known(&[A])).expect("one").as_deref(), Some(A));
        assert_eq!(choose("pvelxc-01h4", &known(&[A])).expect("one").as_deref(), Some(A));
        assert_eq!(choose("02q", &known(&[A, A])).expect("one").as_deref(), Some(A), "two pages");
        assert_eq!(choose("vvv", &both).expect("none"), None);
        let failure = choose("01h4", &both).expect_err("both").to_string();
        assert!(failure.contains(&format!("2 sandboxes are named by 01h4: {A}, {B}")), "{failure}");
    }
}
