//! Parser of the command line, as `pct` reads it: options anywhere, one dash or two, `--` ends
//! them.

use std::collections::BTreeMap;

use crate::conf::values::{self, Complaint};
use crate::failure::{Failure, Result};

/// Type of an option or a positional argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A boolean; without a value it means 1.
    Bool,
    /// A whole number between two bounds.
    Whole(u64, u64),
    Text,
    /// An id of a guest.
    Vmid,
    Snapshot,
    /// A setting of the configuration, checked by `conf::values`.
    Setting,
}

/// Arguments and options of one sub-command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    /// Name, such as `clone`.
    pub(crate) name: &'static str,
    /// Positional arguments in order.
    pub(crate) positional: &'static [(&'static str, Kind)],
    /// Whether more arguments may follow.
    pub(crate) extra: bool,
    pub(crate) options: &'static [(&'static str, Kind)],
    /// Rest of the usage line.
    pub(crate) usage: &'static str,
}

/// Parsed command line that fits its specification.
#[derive(Debug, Clone, Default)]
pub(crate) struct Args {
    positional: Vec<String>,
    options: BTreeMap<String, String>,
    extra: Vec<String>,
}

impl Args {
    /// Returns a positional argument, empty if the specification has none.
    pub(crate) fn at(&self, index: usize) -> &str {
        self.positional.get(index).map_or("", String::as_str)
    }

    /// Returns a positional VMID, which the parser has checked.
    pub(crate) fn vmid(&self, index: usize) -> u32 {
        self.at(index).parse().unwrap_or(0)
    }

    /// Returns an option's value.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// Returns whether a boolean option is on.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.get(name) == Some("1")
    }

    /// Returns the value of a whole-number option.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }

    /// Returns all options, by name.
    pub(crate) fn options(&self) -> &BTreeMap<String, String> {
        &self.options
    }

    /// Returns the arguments behind the last positional one.
    pub(crate) fn extra(&self) -> &[String] {
        &self.extra
    }
}

impl Spec {
    /// Returns the usage line that follows an error.
    pub(crate) fn usage_line(&self) -> String {
        format!("pct {} {}", self.name, self.usage)
    }

    /// Formats several complaints under their heading.
    pub(crate) fn refuse(&self, code: u8, complaints: &BTreeMap<String, Complaint>) -> Failure {
        let mut text = String::from("400 Parameter verification failed.\n");
        let mut blank = false;
        for (name, complaint) in complaints {
            text.push_str(&format!("{name}: {}\n", complaint.text));
            blank = complaint.blank_line;
        }
        if blank {
            text.push('\n');
        }
        Failure::coded(code, text + &self.usage_line())
    }

    /// Parses the arguments behind the sub-command.
    pub(crate) fn parse(&self, argv: &[String]) -> Result<Args> {
        let mut args = Args::default();
        let mut plain = Vec::new();
        let mut unknown = String::new();
        let mut rest = argv.iter().peekable();
        while let Some(arg) = rest.next() {
            if arg == "--" {
                plain.extend(rest.by_ref().cloned());
                break;
            }
            let Some(option) = arg.strip_prefix('-').filter(|o| !o.is_empty()) else {
                plain.push(arg.clone());
                continue;
            };
            let option = option.strip_prefix('-').unwrap_or(option);
            let (name, inline) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (option, None),
            };
            let Some((name, kind)) = self.find(name) else {
                unknown.push_str(&format!("Unknown option: {}\n", name.to_ascii_lowercase()));
                continue;
            };
            let value = match inline {
                Some(value) => value,
                None if kind == Kind::Bool => {
                    let next = rest.next_if(|next| !next.starts_with('-'));
                    next.map_or_else(|| "1".to_owned(), Clone::clone)
                }
                None => match rest.next() {
                    Some(value) => value.clone(),
                    None => {
                        unknown.push_str(&format!("Option {name} requires an argument\n"));
                        continue;
                    }
                },
            };
            args.options.insert(name, value);
        }
        if !unknown.is_empty() {
            let text = format!("{unknown}400 unable to parse option\n{}", self.usage_line());
            return Err(Failure::coded(2, text));
        }
        self.place(&mut args, plain)?;
        self.verify(&mut args)?;
        Ok(args)
    }

    fn place(&self, args: &mut Args, plain: Vec<String>) -> Result {
        let fail = |what: &str| {
            Err(Failure::coded(2, format!("400 {what} arguments\n{}", self.usage_line())))
        };
        if plain.len() < self.positional.len() {
            return fail("not enough");
        }
        if plain.len() > self.positional.len() && !self.extra {
            return fail("too many");
        }
        args.positional = plain;
        args.extra = args.positional.split_off(self.positional.len());
        Ok(())
    }

    fn verify(&self, args: &mut Args) -> Result {
        let mut complaints = BTreeMap::new();
        for ((name, kind), value) in self.positional.iter().zip(&mut args.positional) {
            match kind.check(name, value) {
                Ok(checked) => *value = checked,
                Err(complaint) => {
                    complaints.insert((*name).to_owned(), complaint);
                }
            }
        }
        for (name, value) in &mut args.options {
            let Some((_, kind)) = self.find(name) else { continue };
            match kind.check(name, value) {
                Ok(checked) => *value = checked,
                Err(complaint) => {
                    complaints.insert(name.clone(), complaint);
                }
            }
        }
        if complaints.is_empty() { Ok(()) } else { Err(self.refuse(2, &complaints)) }
    }

    fn find(&self, name: &str) -> Option<(String, Kind)> {
        let same = |option: &str| option.eq_ignore_ascii_case(name);
        if let Some((option, kind)) = self.options.iter().find(|(option, _)| same(option)) {
            return Some(((*option).to_owned(), *kind));
        }
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let family = |option: &str| option.strip_suffix("[n]").is_some_and(|o| o == stem);
        let (_, kind) = self.options.iter().find(|(option, _)| family(option))?;
        (stem != name).then(|| (name.to_owned(), *kind))
    }
}

impl Kind {
    fn check(self, name: &str, value: &str) -> std::result::Result<String, Complaint> {
        match self {
            Self::Bool => values::boolean(value),
            Self::Whole(min, max) => values::whole(value, min, max),
            Self::Text => Ok(value.to_owned()),
            Self::Vmid => values::vmid(value).map(|n| n.to_string()),
            Self::Snapshot if values::is_snapshot_name(value) => Ok(value.to_owned()),
            Self::Snapshot => {
                Err(Complaint::format(&format!("invalid configuration ID '{value}'")))
            }
            Self::Setting => values::check(name, value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: Spec = Spec {
        name: "clone",
        positional: &[("vmid", Kind::Vmid), ("newid", Kind::Vmid)],
        extra: false,
        options: &[("hostname", Kind::Setting), ("full", Kind::Bool), ("net[n]", Kind::Setting)],
        usage: "<vmid> <newid> [OPTIONS]",
    };

    fn parse(line: &str) -> Result<Args> {
        SPEC.parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_parsed_anywhere_with_one_dash_or_two() {
        for line in ["900 101 --full 1", "--full 900 101 -hostname a", "900 --full=1 101"] {
            let args = parse(line);
            if line.starts_with("--full 900") {
                // A switch takes the next word as its value, as in the real `pct`.
                assert!(args.is_err());
                continue;
            }
            let args = args.unwrap();
            assert!(args.flag("full") && args.vmid(1) == 101, "{line}");
        }
    }

    #[test]
    fn argument_errors_are_as_recorded() {
        let said = |line: &str| parse(line).unwrap_err().message;
        assert_eq!(said("900"), "400 not enough arguments\npct clone <vmid> <newid> [OPTIONS]");
        assert_eq!(
            said("900 50"),
            "400 Parameter verification failed.\n\
             newid: invalid format - value does not look like a valid VM ID\n\n\
             pct clone <vmid> <newid> [OPTIONS]"
        );
        assert_eq!(
            said("abc 101"),
            "400 Parameter verification failed.\n\
             vmid: type check ('integer') failed - got 'abc'\n\
             pct clone <vmid> <newid> [OPTIONS]"
        );
        assert!(said("900 101 --tags x").starts_with("Unknown option: tags\n400 unable to parse"));
        assert_eq!(
            parse("900 101 --net0 name=eth0").unwrap().get("net0").map(|n| &n[..9]),
            Some("name=eth0")
        );
    }
}
