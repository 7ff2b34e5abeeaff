//! Egress of a sandbox: nothing, the names of a list, or everything public. Pure.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{id::Invalid, sandbox::v1 as wire};

/// Most names of an allow-list.
pub const NAMES_MAX: usize = 64;
/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 253;
/// Longest label of a name, in bytes.
const LABEL_BYTES_MAX: usize = 63;
/// Beginning of a name that stands for all names below it.
const WILDCARD: &str = "*.";

/// Names that an entry of an allow-list stands for: one name such as `github.com`, or all names below
/// one such as `*.npmjs.org`, which `npmjs.org` itself is not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EgressName(String);

impl EgressName {
    /// Returns the text in its normal form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true when `name`, in lower case and without a dot at its end, is one of these names.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_prefix(WILDCARD) {
            None => self.0 == name,
            Some(suffix) => {
                let below = name.strip_suffix(suffix).and_then(|rest| rest.strip_suffix('.'));
                below.is_some_and(|rest| !rest.is_empty())
            }
        }
    }

    /// Returns true when every name that `other` stands for is one of these names.
    pub fn covers(&self, other: &Self) -> bool {
        if self == other {
            return true;
        }
        // Names below `*.b.c` are below `*.c`, as `b.c` itself is.
        self.0.starts_with(WILDCARD)
            && self.matches(other.0.strip_prefix(WILDCARD).unwrap_or(&other.0))
    }
}

impl fmt::Display for EgressName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for EgressName {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = |why: &str| Err(Invalid::new("egress_names", format!("{why}: {text:?}")));
        if text.len() > NAME_BYTES_MAX + WILDCARD.len() {
            let why = "must be at most 253 bytes long each";
            return Err(Invalid::new("egress_names", why));
        }
        if !text.is_ascii() {
            return wrong("must be in ASCII, an international name in its form xn--");
        }
        let normal = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let name = normal.strip_prefix(WILDCARD).unwrap_or(&normal);
        let is_label = |label: &str| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > NAME_BYTES_MAX || !name.split('.').all(is_label) {
            return wrong("must be DNS names, such as github.com or *.npmjs.org");
        }
        let (_, last) = name.rsplit_once('.').unwrap_or_default();
        if last.is_empty() {
            return wrong("must have a dot in the name (`*.com` is everybody's)");
        }
        if last.bytes().all(|b| b.is_ascii_digit()) {
            return wrong("must be names, and not addresses");
        }
        Ok(Self(normal))
    }
}

/// Names that a sandbox may reach: 1 to 64, ordered, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList(Arc<[EgressName]>);

impl AllowList {
    /// Parses a list.
    ///
    /// # Errors
    /// When it is empty or too long, or has a name that breaks a rule.
    pub fn parse<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, Invalid> {
        let mut all = BTreeSet::new();
        for (index, name) in names.into_iter().enumerate() {
            if index == NAMES_MAX {
                return Err(Invalid::new("egress_names", "must be at most 64"));
            }
            all.insert(name.parse()?);
        }
        let why = "must have at least one name with ALLOW, such as allow=github.com,*.npmjs.org";
        Self::of(all).ok_or_else(|| Invalid::new("egress_names", why))
    }

    fn of(names: BTreeSet<EgressName>) -> Option<Self> {
        (!names.is_empty()).then(|| Self(names.into_iter().take(NAMES_MAX).collect()))
    }

    /// Returns the names in their order.
    pub fn names(&self) -> &[EgressName] {
        &self.0
    }

    /// Returns true when a sandbox may reach `name`, given in lower case and without a dot at its end.
    pub fn allows(&self, name: &str) -> bool {
        self.0.iter().any(|entry| entry.matches(name))
    }

    /// Returns true when all that `other` allows is allowed by this list.
    pub fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|name| self.has(name))
    }

    fn has(&self, name: &EgressName) -> bool {
        self.0.iter().any(|entry| entry.covers(name))
    }

    /// Returns the names that both lists allow; `None` when there are none. More than 64 are cut off.
    fn both(&self, other: &Self) -> Option<Self> {
        let of_self = self.0.iter().filter(|name| other.has(name));
        let of_other = other.0.iter().filter(|name| self.has(name));
        Self::of(of_self.chain(of_other).cloned().collect())
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(EgressName::as_str).collect();
        f.write_str(&names.join(","))
    }
}

/// Reach of a sandbox outside of itself, from the tightest to the widest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Egress {
    /// Nothing. Connections into the sandbox are answered.
    None,
    /// Public addresses of these names.
    Allow(AllowList),
    /// Public addresses, and the name servers of its node.
    #[default]
    Open,
}

impl Egress {
    /// Returns the word for it, without names.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Allow(_) => "allow",
            Self::Open => "open",
        }
    }

    /// Returns the names of its list; none without a list.
    pub fn names(&self) -> Vec<String> {
        self.list()
            .map_or_else(Vec::new, |list| list.names().iter().map(ToString::to_string).collect())
    }

    /// Returns its list, if it has one.
    pub const fn list(&self) -> Option<&AllowList> {
        match self {
            Self::Allow(list) => Some(list),
            Self::None | Self::Open => None,
        }
    }

    /// Returns true when a sandbox with `other` reaches nothing that one with this does not.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Open, _) | (_, Self::None) => true,
            (Self::Allow(list), Self::Allow(other)) => list.covers(other),
            (Self::Allow(_) | Self::None, _) => false,
        }
    }

    /// Returns what both allow.
    #[must_use]
    pub fn both(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::None, _) | (_, Self::None) => Self::None,
            (Self::Open, one) | (one, Self::Open) => one.clone(),
            (Self::Allow(one), Self::Allow(other)) => {
                one.both(other).map_or(Self::None, Self::Allow)
            }
        }
    }

    /// Reads the value and the names of a message; `None` where it is unspecified.
    ///
    /// # Errors
    /// When a later version has made the value, or the names are wrong or not to be given. The error
    /// names `field`, or the one of the names beside it.
    pub fn read(
        value: i32,
        names: &[String],
        field: &'static str,
    ) -> Result<Option<Self>, Invalid> {
        let of_names = |invalid: Invalid| invalid.named(format!("{field}_names"));
        let read = match wire::Egress::try_from(value) {
            Ok(wire::Egress::Unspecified) => None,
            Ok(wire::Egress::Open) => Some(Self::Open),
            Ok(wire::Egress::None) => Some(Self::None),
            Ok(wire::Egress::Allow) => {
                let list = AllowList::parse(names.iter().map(String::as_str));
                return list.map(|list| Some(Self::Allow(list))).map_err(of_names);
            }
            Err(_) => return Err(Invalid::new(field, "must be OPEN, NONE or ALLOW")),
        };
        if !names.is_empty() {
            return Err(of_names(Invalid::new("", "must be empty, unless the egress is ALLOW")));
        }
        Ok(read)
    }
}

impl From<&Egress> for wire::Egress {
    fn from(egress: &Egress) -> Self {
        match egress {
            Egress::None => Self::None,
            Egress::Allow(_) => Self::Allow,
            Egress::Open => Self::Open,
        }
    }
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        self.list().map_or(Ok(()), |list| write!(f, "={list}"))
    }
}

impl FromStr for Egress {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.split_once('=') {
            None if text == "none" => Ok(Self::None),
            None if text == "open" => Ok(Self::Open),
            Some(("allow", names)) => {
                let list = AllowList::parse(names.split(','));
                list.map(Self::Allow).map_err(|invalid| invalid.named("egress"))
            }
            None | Some(_) => Err(Invalid::new("egress", "must be open, none or allow=NAME,NAME")),
        }
    }
}

impl From<Egress> for String {
    fn from(egress: Egress) -> Self {
        egress.to_string()
    }
}

impl TryFrom<String> for Egress {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn egress(text: &str) -> Egress {
        text.parse().expect(text)
    }

    #[test]
    fn egress_has_a_text_and_a_value() {
        for text in ["none", "open", "allow=*.npmjs.org,github.com"] {
            let one = egress(text);
            assert_eq!(one.to_string(), text);
            let value = wire::Egress::from(&one).into();
            assert_eq!(Egress::read(value, &one.names(), "egress"), Ok(Some(one)));
        }
        assert_eq!(egress("allow=B.c.,a.b,b.c").to_string(), "allow=a.b,b.c", "the normal form");
        assert_eq!(Egress::read(0, &[], "egress"), Ok(None));
        for wrong in ["", "Open", "allow", "allow=", "allow=a.b,", "allow=a.b c.d", "deny=a.b"] {
            assert!(wrong.parse::<Egress>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn names_are_given_with_allow_alone() {
        let names = ["github.com".to_owned()];
        let field = |value: i32, names: &[String]| {
            Egress::read(value, names, "limits.egress").expect_err("wrong").what
        };
        assert_eq!(field(3, &[]), "limits.egress_names");
        assert_eq!(field(2, &names), "limits.egress_names");
        assert_eq!(field(0, &names), "limits.egress_names");
        assert_eq!(field(9, &names), "limits.egress");
        assert_eq!(field(3, &vec!["a.b".to_owned(); 65]), "limits.egress_names");
        let many: Vec<_> = (0..64).map(|n| format!("n{n}.example.org")).collect();
        assert!(Egress::read(3, &many, "egress").is_ok());
    }

    #[test]
    fn wrong_names_are_refused() {
        let long = format!("{}.org", "a".repeat(64));
        let longer = format!("{}a.org", "a.".repeat(130));
        let wrong = [
            "",
            ".",
            "*",
            "*.",
            "*.com",
            "com",
            "localhost",
            "a..b",
            ".a.b",
            "a.b..",
            "-a.b",
            "a-.b",
            "a_b.c",
            "a.*.b",
            "*a.b",
            "**.a.b",
            "10.0.0.1",
            "*.0.0.1",
            "::1",
            "a.b:80",
            "a.b/24",
            "http://a.b",
            "bücher.example",
            "a b.c",
            "a.b\n",
            "a\0.b",
            "*.*.a.b",
            &long,
            &longer,
        ];
        for name in wrong {
            assert!(name.parse::<EgressName>().is_err(), "{name:?}");
        }
        for (name, normal) in [
            ("GitHub.com", "github.com"),
            ("*.A.B.", "*.a.b"),
            ("xn--bcher-kva.de", "xn--bcher-kva.de"),
        ] {
            assert_eq!(name.parse::<EgressName>().expect(name).as_str(), normal);
        }
    }

    #[test]
    fn wildcard_stands_for_what_is_below_a_name() {
        let list = AllowList::parse(["github.com", "*.npmjs.org"]).expect("a list");
        for name in ["github.com", "cdn.npmjs.org", "a.b.npmjs.org"] {
            assert!(list.allows(name), "{name}");
        }
        for name in
            ["", "npmjs.org", ".npmjs.org", "xnpmjs.org", "api.github.com", "github.com.evil.org"]
        {
            assert!(!list.allows(name), "{name}");
        }
        let covers = |one: &str, other: &str| egress(one).covers(&egress(other));
        assert!(covers("allow=*.a.b", "allow=x.a.b,*.y.a.b,*.a.b"));
        assert!(!covers("allow=*.a.b", "allow=a.b") && !covers("allow=x.a.b", "allow=*.x.a.b"));
        assert!(
            covers("open", "allow=a.b") && covers("allow=a.b", "none") && covers("none", "none")
        );
        assert!(!covers("allow=a.b", "open") && !covers("none", "allow=a.b"));
        assert_eq!(
            egress("allow=*.a.b,c.d").both(&egress("allow=x.a.b,e.f")),
            egress("allow=x.a.b")
        );
        assert_eq!(egress("allow=a.b").both(&egress("allow=c.d")), Egress::None);
    }

    fn any_name() -> impl Strategy<Value = String> {
        let labels = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 2..5);
        (any::<bool>(), labels).prop_map(|(wild, labels)| {
            format!("{}{}", if wild { "*." } else { "" }, labels.join("."))
        })
    }

    fn any_egress() -> impl Strategy<Value = Egress> {
        let list = prop::collection::vec(any_name(), 1..5);
        let list = list.prop_map(|names| {
            Egress::Allow(AllowList::parse(names.iter().map(String::as_str)).expect("names"))
        });
        prop_oneof![Just(Egress::None), Just(Egress::Open), list]
    }

    /// Whether a sandbox with this egress reaches this name.
    fn reaches(egress: &Egress, name: &str) -> bool {
        match egress {
            Egress::None => false,
            Egress::Open => true,
            Egress::Allow(list) => list.allows(name),
        }
    }

    proptest! {
        #[test]
        fn every_text_is_refused_or_has_a_normal_form(text in "\\PC{0,40}|[a-c*.-]{0,12}") {
            if let Ok(name) = text.parse::<EgressName>() {
                prop_assert_eq!(name.as_str().parse::<EgressName>(), Ok(name.clone()));
            }
        }

        #[test]
        fn what_is_covered_reaches_no_more(
            one in any_egress(),
            other in any_egress(),
            labels in prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 2..6),
        ) {
            let name = labels.join(".");
            if one.covers(&other) {
                prop_assert!(!reaches(&other, &name) || reaches(&one, &name));
            }
            let both = one.both(&other);
            prop_assert_eq!(reaches(&both, &name), reaches(&one, &name) && reaches(&other, &name));
            prop_assert!(one.covers(&both) && other.covers(&both));
            prop_assert!(one.covers(&one));
            prop_assert_eq!(both.to_string().parse::<Egress>(), Ok(both));
        }
    }
}
