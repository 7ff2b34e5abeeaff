//! Completion: finds out from the words of an unfinished command line which values can come next.
//! Pure; the values themselves are read by the hidden verb `__complete`.

use std::collections::BTreeMap;

use clap::{Arg, Command};

/// Values that can come next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Values {
    /// These words, each with a description.
    Words(Vec<(String, String)>),
    /// Sandboxes.
    Sandboxes,
    /// Paths in sandboxes, or files of this machine.
    Places,
    /// Nodes.
    Nodes,
    /// Snapshots.
    Snapshots,
    /// Contexts of the configuration.
    Contexts,
    /// Commands of the sandbox that was named.
    Execs(String),
    /// Nothing that is known here: the shell completes files.
    Other,
}

/// Place in a command line.
#[derive(Debug)]
pub(crate) struct Point {
    /// Values that can come next.
    pub(crate) values: Values,
    /// Part of the last word that stays, such as `--node=`.
    pub(crate) stays: String,
    /// Part of the last word that the value begins with.
    pub(crate) typed: String,
    /// Values of the flags before it, by the names of the arguments.
    pub(crate) flags: BTreeMap<String, String>,
}

/// Walk through the words of a command line.
struct Walk<'a> {
    command: &'a Command,
    positionals: Vec<String>,
    flags: BTreeMap<String, String>,
    /// Flag whose value comes next.
    pending: Option<&'a Arg>,
    /// Whether what comes is not for us any more.
    escaped: bool,
}

/// Finds the values for the last of the words; `root` must be built.
pub(crate) fn at(root: &Command, words: &[String]) -> Point {
    let (last, before) = words.split_last().map_or(("", words), |(last, rest)| (last, rest));
    let mut walk = Walk {
        command: root,
        positionals: Vec::new(),
        flags: BTreeMap::new(),
        pending: None,
        escaped: false,
    };
    before.iter().for_each(|word| walk.pass(word));
    walk.end(last)
}

impl<'a> Walk<'a> {
    fn pass(&mut self, word: &str) {
        if let Some(flag) = self.pending.take() {
            self.flags.insert(flag.get_id().to_string(), word.to_owned());
        } else if self.is_raw() {
            self.positionals.push(word.to_owned());
        } else if word == "--" {
            self.escaped = true;
        } else if let Some(long) = word.strip_prefix("--") {
            let (name, value) =
                long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
            self.flag(self.by_long(name), value);
        } else if word.len() > 1 && word.starts_with('-') {
            self.shorts(&word[1..]);
        } else if let Some(verb) = self.verb(word) {
            self.command = verb;
        } else {
            self.positionals.push(word.to_owned());
        }
    }

    fn flag(&mut self, flag: Option<&'a Arg>, value: Option<&str>) {
        let Some(flag) = flag.filter(|flag| flag.get_action().takes_values()) else { return };
        match value {
            Some(value) => drop(self.flags.insert(flag.get_id().to_string(), value.to_owned())),
            None => self.pending = Some(flag),
        }
    }

    /// Passes short flags in one word, such as `-it` or `-sKILL`.
    fn shorts(&mut self, letters: &str) {
        for (at, letter) in letters.char_indices() {
            let flag = self.command.get_arguments().find(|arg| arg.get_short() == Some(letter));
            let rest = &letters[at + letter.len_utf8()..];
            if flag.is_some_and(|flag| flag.get_action().takes_values()) {
                return self.flag(flag, (!rest.is_empty()).then_some(rest));
            }
        }
    }

    fn by_long(&self, name: &str) -> Option<&'a Arg> {
        self.command.get_arguments().find(|arg| {
            arg.get_long() == Some(name)
                || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
        })
    }

    fn verb(&self, word: &str) -> Option<&'a Command> {
        let first = self.positionals.is_empty();
        first.then(|| self.command.find_subcommand(word)).flatten()
    }

    /// Arguments without a flag, in their order.
    fn places(&self) -> Vec<&'a Arg> {
        self.command.get_positionals().collect()
    }

    /// Whether every word from here on is a word of another program.
    fn is_raw(&self) -> bool {
        let program = self.places().iter().position(|arg| arg.is_trailing_var_arg_set());
        self.escaped || program.is_some_and(|at| self.positionals.len() > at)
    }

    fn end(self, last: &str) -> Point {
        let (stays, typed) = match last.split_once('=') {
            Some((name, value)) if name.starts_with("--") && !self.is_raw() => {
                (format!("{name}="), value)
            }
            _ => (String::new(), last),
        };
        let values = if let Some(flag) = self.pending {
            self.of(flag)
        } else if !stays.is_empty() {
            self.by_long(&stays[2..stays.len() - 1]).map_or(Values::Other, |flag| self.of(flag))
        } else if last.starts_with('-') && !self.is_raw() {
            Values::Words(self.flag_names())
        } else {
            self.positional()
        };
        Point { values, stays, typed: typed.to_owned(), flags: self.flags }
    }

    fn flag_names(&self) -> Vec<(String, String)> {
        let shown = self.command.get_arguments().filter(|arg| !arg.is_hide_set());
        let described = shown
            .filter_map(|arg| Some((format!("--{}", arg.get_long()?), first_line(arg.get_help()))));
        described.collect()
    }

    fn positional(&self) -> Values {
        let verbs = self.command.get_subcommands().filter(|verb| !verb.is_hide_set());
        let verbs: Vec<_> =
            verbs.map(|verb| (verb.get_name().to_owned(), first_line(verb.get_about()))).collect();
        if self.positionals.is_empty() && !verbs.is_empty() && !self.escaped {
            return Values::Words(verbs);
        }
        let places = self.places();
        let many = |arg: &&&Arg| arg.get_num_args().is_some_and(|range| range.max_values() > 1);
        let place = places.get(self.positionals.len()).or_else(|| places.last().filter(many));
        place.map_or(Values::Other, |arg| self.of(arg))
    }

    /// Values of an argument.
    fn of(&self, arg: &Arg) -> Values {
        let possible = arg.get_possible_values();
        if !possible.is_empty() {
            let described = possible.iter().filter(|value| !value.is_hide_set());
            let described =
                described.map(|value| (value.get_name().to_owned(), first_line(value.get_help())));
            return Values::Words(described.collect());
        }
        match arg.get_id().as_str() {
            "id" | "ids" => Values::Sandboxes,
            "source" | "destination" => Values::Places,
            "node" => Values::Nodes,
            "snapshot" => Values::Snapshots,
            "context" | "context_name" => Values::Contexts,
            "exec_id" if arg.is_positional() => {
                Values::Execs(self.positionals.first().cloned().unwrap_or_default())
            }
            _ => Values::Other,
        }
    }
}

fn first_line(text: Option<&clap::builder::StyledStr>) -> String {
    let text = text.map(ToString::to_string).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn point(line: &str) -> Point {
        let mut root = crate::args::Args::command();
        root.build();
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        at(&root, &words)
    }

    fn words(line: &str) -> Vec<String> {
        let values = point(line).values;
        let Values::Words(words) = values else { panic!("{line}: {values:?}") };
        words.into_iter().map(|(word, _)| word).collect()
    }

    #[test]
    fn verbs_and_flags_come_from_the_command_line() {
        assert!(words("").contains(&"exec".to_owned()));
        assert!(!words("").contains(&"__complete".to_owned()), "hidden");
        assert_eq!(words("snapshot "), ["ls", "help"]);
        assert!(words("ls --").contains(&"--filter".to_owned()));
        assert_eq!(words("-o "), ["wide", "json", "name"]);
        assert_eq!(words("--output="), ["wide", "json", "name"]);
        assert_eq!(point("ls --output=na").typed, "na");
        assert_eq!(words("create --ttl-action "), ["pause", "stop", "delete"]);
    }

    #[test]
    fn values_are_known_by_their_arguments() {
        for (line, values) in [
            ("get pv", Values::Sandboxes),
            ("--endpoint https://c:1 rm -o name a b ", Values::Sandboxes),
            ("delete ", Values::Sandboxes),
            ("exec -it ", Values::Sandboxes),
            ("exec -it --user ada ", Values::Sandboxes),
            ("cp ./x ", Values::Places),
            ("create --snapshot ", Values::Snapshots),
            ("create --node=", Values::Nodes),
            ("cordon ", Values::Nodes),
            ("logs -f 100001 ", Values::Execs("100001".into())),
            ("kill -sKILL 100001 ", Values::Execs("100001".into())),
            ("--context ", Values::Contexts),
            ("context use ", Values::Contexts),
            ("exec 100001 ls ", Values::Other),
            ("exec 100001 -- ls -", Values::Other),
            ("get 100001 ", Values::Other),
            ("exec --env ", Values::Other),
        ] {
            assert_eq!(point(line).values, values, "{line:?}");
        }
        let flags = point("--endpoint https://c:1 ls --ca=/x ").flags;
        assert_eq!(flags["endpoint"], "https://c:1");
        assert_eq!(flags["ca"], "/x");
    }
}
