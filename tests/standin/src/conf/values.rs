//! The settings and their valid values.
//!
//! Every check returns either the value as it is stored or a complaint in PVE's words.

use super::net;

/// A complaint about a value. PVE ends some of them with a line break, which shows as an empty
/// line before the usage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    pub text: String,
    /// Whether an empty line follows.
    pub blank_line: bool,
}

impl Complaint {
    /// Returns a complaint about a wrong type or length.
    pub(crate) fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), blank_line: false }
    }

    /// Returns a complaint about a value with a bad format.
    pub(crate) fn format(text: &str) -> Self {
        Self { text: format!("invalid format - {text}"), blank_line: true }
    }
}

type Checked = Result<String, Complaint>;

/// Type of a setting.
enum Kind {
    Bool,
    Whole(u64, u64),
    Number(f64, f64),
    Text(usize),
    Words(&'static [&'static str]),
    DnsName,
    Tags,
    Net,
}

const DESCRIPTION_MAX: usize = 8192;

fn kind(key: &str) -> Option<Kind> {
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    Some(match (key, stem) {
        ("console" | "debug" | "onboot" | "protection" | "template" | "unprivileged", _) => {
            Kind::Bool
        }
        ("cores", _) => Kind::Whole(1, 8192),
        ("cpuunits", _) => Kind::Whole(0, 500_000),
        ("memory", _) => Kind::Whole(16, u64::MAX),
        ("swap" | "snaptime", _) => Kind::Whole(0, u64::MAX),
        ("tty", _) => Kind::Whole(0, 6),
        ("cpulimit", _) => Kind::Number(0.0, 8192.0),
        ("arch", _) => Kind::Words(&["amd64", "i386", "arm64", "armhf", "riscv32", "riscv64"]),
        ("cmode", _) => Kind::Words(&["shell", "console", "tty"]),
        ("lock", _) => Kind::Words(&[
            "backup",
            "create",
            "destroyed",
            "disk",
            "fstrim",
            "migrate",
            "mounted",
            "rollback",
            "snapshot",
            "snapshot-delete",
        ]),
        ("hostname", _) => Kind::DnsName,
        ("tags", _) => Kind::Tags,
        ("description", _) => Kind::Text(DESCRIPTION_MAX),
        (
            "entrypoint" | "features" | "hookscript" | "nameserver" | "ostype" | "parent"
            | "rootfs" | "searchdomain" | "snapstate" | "startup" | "timezone" | "delete",
            _,
        ) => Kind::Text(usize::MAX),
        (_, "net") if key != stem => Kind::Net,
        (_, "mp" | "unused" | "dev") if key != stem => Kind::Text(usize::MAX),
        _ => return None,
    })
}

/// Returns whether a configuration may have this key.
#[must_use]
pub fn is_key(key: &str) -> bool {
    key != "description" && kind(key).is_some()
}

/// Returns the parser's complaint about a value in a file; only types are checked there.
#[must_use]
pub fn complaint_when_read(key: &str, value: &str) -> Option<String> {
    let complaint = match kind(key)? {
        Kind::Bool => boolean(value).err(),
        Kind::Whole(..) => value.parse::<u64>().is_err().then(|| wrong_type("integer", value)),
        Kind::Number(..) => value.parse::<f64>().is_err().then(|| wrong_type("number", value)),
        Kind::Text(_) | Kind::Words(_) | Kind::DnsName | Kind::Tags | Kind::Net => None,
    };
    complaint.map(|c| c.text)
}

/// Checks a value given on the command line and converts it to its stored form.
pub fn check(key: &str, value: &str) -> Checked {
    match kind(key) {
        None => Err(Complaint::plain("unknown option")),
        Some(Kind::Bool) => boolean(value),
        Some(Kind::Whole(min, max)) => whole(value, min, max),
        Some(Kind::Number(min, max)) => number(value, min, max),
        Some(Kind::Text(max)) => text(value, max),
        Some(Kind::Words(words)) if words.contains(&value) => Ok(value.to_owned()),
        Some(Kind::Words(words)) => Err(Complaint::plain(format!(
            "value '{value}' does not have a value in the enumeration '{}'",
            words.join(", ")
        ))),
        Some(Kind::DnsName) => dns_name(value),
        Some(Kind::Tags) => tags(value),
        Some(Kind::Net) => net::check(value),
    }
}

fn wrong_type(name: &str, value: &str) -> Complaint {
    Complaint::plain(format!("type check ('{name}') failed - got '{value}'"))
}

/// Checks a boolean in any of the forms that PVE accepts.
pub fn boolean(value: &str) -> Checked {
    match value.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Ok("1".to_owned()),
        "0" | "off" | "no" | "false" => Ok("0".to_owned()),
        _ => Err(wrong_type("boolean", value)),
    }
}

/// Checks a whole number against its bounds.
pub fn whole(value: &str, min: u64, max: u64) -> Checked {
    let number: i128 = value.parse().map_err(|_| wrong_type("integer", value))?;
    if number < i128::from(min) {
        return Err(Complaint::plain(format!("value must have a minimum value of {min}")));
    }
    if number > i128::from(max) {
        return Err(Complaint::plain(format!("value must have a maximum value of {max}")));
    }
    Ok(number.to_string())
}

fn number(value: &str, min: f64, max: f64) -> Checked {
    let number: f64 = value.parse().map_err(|_| wrong_type("number", value))?;
    if !number.is_finite() || number < min {
        return Err(Complaint::plain(format!("value must have a minimum value of {min}")));
    }
    if number > max {
        return Err(Complaint::plain(format!("value must have a maximum value of {max}")));
    }
    Ok(value.to_owned())
}

fn text(value: &str, max: usize) -> Checked {
    if value.chars().count() > max {
        return Err(Complaint::plain(format!("value may only be {max} characters long")));
    }
    Ok(value.to_owned())
}

/// Checks a DNS name of one label or more.
pub fn dns_name(value: &str) -> Checked {
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if !value.split('.').all(label) {
        return Err(Complaint::format("value does not look like a valid DNS name"));
    }
    text(value, 255)
}

fn tags(value: &str) -> Checked {
    let mut tags: Vec<String> = value
        .split([';', ',', ' ', '\0'])
        .filter(|t| !t.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    let good = |tag: &String| {
        let mut bytes = tag.bytes();
        bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b))
    };
    if !tags.iter().all(good) {
        return Err(Complaint::format("invalid characters in tag"));
    }
    tags.sort();
    tags.dedup();
    Ok(tags.join(";"))
}

/// Checks a VMID.
pub fn vmid(value: &str) -> Result<u32, Complaint> {
    let number: i128 = value.parse().map_err(|_| wrong_type("integer", value))?;
    let plain = !value.starts_with(['0', '+', '-']);
    u32::try_from(number)
        .ok()
        .filter(|n| plain && (100..=999_999_999).contains(n))
        .ok_or_else(|| Complaint::format("value does not look like a valid VM ID"))
}

/// Returns whether a snapshot may have this name.
#[must_use]
pub fn is_snapshot_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && name.len() > 1
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_sorted_lowered_and_unique() {
        assert_eq!(check("tags", "b;a,C a").as_deref(), Ok("a;b;c"));
        assert_eq!(check("tags", "preset_x.y-1+z").as_deref(), Ok("preset_x.y-1+z"));
        let complaint = check("tags", "bad tag!").unwrap_err();
        assert_eq!(complaint.text, "invalid format - invalid characters in tag");
    }

    #[test]
    fn vmids_are_checked() {
        assert_eq!(vmid("100"), Ok(100));
        assert_eq!(vmid("999999999"), Ok(999_999_999));
        assert_eq!(vmid("abc").unwrap_err().text, "type check ('integer') failed - got 'abc'");
        for bad in ["99", "1000000000", "0100", "-5", "99999999999999999999"] {
            let complaint = vmid(bad).unwrap_err();
            assert!(complaint.text.ends_with("valid VM ID"), "{bad}: {}", complaint.text);
        }
    }

    #[test]
    fn sizes_and_names_are_checked() {
        assert!(check("description", &"x".repeat(8192)).is_ok());
        assert_eq!(
            check("description", &"x".repeat(8193)).unwrap_err().text,
            "value may only be 8192 characters long"
        );
        assert!(check("hostname", "UPPER.case-1").is_ok());
        for bad in ["under_score", "bad_host!", "-a", "a..b", "a\nb", ""] {
            assert!(check("hostname", bad).is_err(), "{bad:?}");
        }
        assert!(check("memory", "15").is_err());
        assert!(check("cpulimit", "1.5").is_ok());
        assert!(check("net", "x").is_err());
    }
}
