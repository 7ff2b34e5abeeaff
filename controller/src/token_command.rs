//! `token`: makes, lists and revokes tokens in the controller's own database, also beside a running
//! controller. The first operator's token can only be made here.

use std::{io::Write, path::Path, time::Duration};

use anyhow::Context;
use clap::{Subcommand, builder::PossibleValuesParser};
use proto::{
    name::{Team, TokenName, UserLabel},
    scope::{Scopes, WORDS},
    token::{Format, ID_DIGITS},
};

use crate::{
    clock::{Clock, SystemClock},
    store::{AccessStore, Added, Token, TokenFilter, sqlite::Sqlite},
    token::{self, Issued, Order},
};

/// Tokens that are read at once.
const PAGE: u32 = 500;

/// Sub-commands that manage tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make one and print it. It is shown this once only.
    Create {
        /// Whose sandboxes it is for.
        #[arg(long)]
        team: Team,
        /// Name of the token; its id, unless given. Unique among the team's living tokens.
        #[arg(long)]
        name: Option<TokenName>,
        /// The person or program that it is for.
        #[arg(long)]
        user: Option<UserLabel>,
        /// Calls that it allows; those of read, exec and manage, unless given. `operator` means all scopes.
        #[arg(long = "scope", value_parser = PossibleValuesParser::new(WORDS))]
        scopes: Vec<String>,
        /// How long it is good, such as 12h or 30d; for ever, unless given.
        #[arg(long, value_name = "TIME", value_parser = time)]
        expires: Option<Duration>,
        /// How it is written: `e2b` is what the libraries of E2B take.
        #[arg(long, default_value = Format::Plain.name(), value_parser = format())]
        format: String,
    },
    /// List them, without their secrets.
    Ls,
    /// Make one useless, at once.
    Revoke {
        /// Its id, as `ls` shows it.
        id: String,
    },
}

fn format() -> PossibleValuesParser {
    PossibleValuesParser::new(Format::ALL.map(Format::name))
}

fn time(text: &str) -> Result<Duration, String> {
    proto::duration::parse(text).ok_or_else(|| "must be a time such as 12h or 30d".into())
}

/// Returns the scopes of a new token.
fn scopes(words: &[String]) -> anyhow::Result<Scopes> {
    let asked: Scopes = words.join(" ").parse()?;
    // An operator's token has always been able to use the sandboxes of its team as well.
    let all = words.is_empty() || words.iter().any(|word| word == "operator");
    Ok(if all { asked.iter().fold(Scopes::SANDBOX, Scopes::with) } else { asked })
}

impl TokenCommand {
    /// Checks the arguments, and makes the token that is to be stored.
    ///
    /// # Errors
    /// When an argument is wrong.
    pub(crate) fn prepare(self) -> anyhow::Result<Prepared> {
        Ok(match self {
            Self::Create { team, name, user, scopes: words, expires, format } => {
                let now_ms = SystemClock.now_ms();
                let expires_ms =
                    expires.map_or(0, |time| now_ms.saturating_add(daemon::clock::millis(time)));
                let scopes = scopes(&words)?;
                let issued = token::issue(Order { team, name, user, scopes, expires_ms }, now_ms);
                Prepared::Create(Box::new(issued), Format::named(&format).unwrap_or_default())
            }
            Self::Ls => Prepared::Ls,
            Self::Revoke { id } => Prepared::Revoke(id),
        })
    }
}

/// Command whose arguments are good.
#[derive(Debug)]
pub(crate) enum Prepared {
    Create(Box<Issued>, Format),
    Ls,
    Revoke(String),
}

/// Entry of a command, as the audit log is told of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    /// Name in the place of a method.
    pub(crate) method: &'static str,
    /// Token, as `token:NAME`.
    pub(crate) object: String,
    /// Team of the token, where it is known.
    pub(crate) owner: String,
}

impl Prepared {
    /// Returns what the audit log is told; `None` for a command that only reads.
    pub(crate) fn recorded(&self) -> Option<Recorded> {
        let (method, name, owner) = match self {
            Self::Create(issued, _) => {
                let Token { name, team, .. } = &issued.token;
                ("LocalTokenCreate", name.as_str(), team.to_string())
            }
            Self::Revoke(text) => ("LocalTokenRevoke", id_of(text), String::new()),
            Self::Ls => return None,
        };
        let object = if name.is_empty() { String::new() } else { format!("token:{name}") };
        Some(Recorded { method, object, owner })
    }

    /// Runs the command over the database in a directory.
    ///
    /// # Errors
    /// When there is no database, or the command fails.
    pub(crate) async fn run(self, data_dir: &Path) -> anyhow::Result<()> {
        let path = data_dir.join("controller.db");
        anyhow::ensure!(
            data_dir.is_dir(),
            "{} is not there: run `setup` first",
            data_dir.display()
        );
        let store =
            Sqlite::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let now_ms = SystemClock.now_ms();
        match self {
            Self::Create(issued, format) => {
                match store.add_token(issued.token.clone()).await? {
                    Added::New => {}
                    Added::NameTaken => {
                        let Token { team, name, .. } = issued.token;
                        anyhow::bail!(
                            "team {team} has a token {name} already; give another --name"
                        );
                    }
                    // Only SSH keys have this answer.
                    Added::KeyTaken => anyhow::bail!("the team has this key already"),
                    Added::Full => anyhow::bail!("the team has too many tokens; revoke some"),
                }
                say(&issued.text(format))
            }
            Self::Ls => ls(&store, now_ms).await,
            Self::Revoke(id) => {
                anyhow::ensure!(store.revoke_token(&id, now_ms).await?, "there is no token {id}");
                say(&format!("revoked {id}"))
            }
        }
    }
}

/// Returns the id in a text that should be one: somebody may have given a whole token.
fn id_of(text: &str) -> &str {
    let is_id = text.len() == ID_DIGITS && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match proto::token::split(text) {
        Some((id, _)) => id,
        None if is_id => text,
        None => "",
    }
}

async fn ls(store: &Sqlite, now_ms: u64) -> anyhow::Result<()> {
    let mut after = None;
    loop {
        let page = store.tokens(TokenFilter::default(), after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some((last.created_ms, last.id.clone()));
        for token in page {
            let state = match &token {
                Token { revoked_ms: 1.., .. } => "revoked",
                token if token.is_expired(now_ms) => "expired",
                _ => "good",
            };
            let Token { id, team, scopes, name, user, .. } = token;
            let user = user.as_ref().map_or("-", UserLabel::as_str);
            // Scripts know the first four.
            say(&format!("{id}\t{team}\t{scopes}\t{state}\t{name}\t{user}"))?;
        }
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_of_a_new_token_are_what_is_asked_for() {
        let of = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(ToString::to_string).collect();
            scopes(&words).expect("known words").to_string()
        };
        assert_eq!(of(&[]), "read exec manage");
        assert_eq!(of(&["sandbox"]), "read exec manage");
        assert_eq!(of(&["operator"]), "read exec manage admin");
        assert_eq!(of(&["read"]), "read");
        assert_eq!(of(&["admin", "exec"]), "read exec admin");
    }

    #[test]
    fn audit_log_is_told_of_changes_and_of_no_secret() {
        let create = |name: Option<&str>| TokenCommand::Create {
            team: "red".parse().expect("a team"),
            name: name.map(|name| name.parse().expect("a name")),
            user: None,
            scopes: vec!["admin".into()],
            expires: None,
            format: "pvesb".into(),
        };
        let recorded = |command: TokenCommand| command.prepare().expect("good").recorded();
        let told = recorded(create(Some("ci"))).expect("recorded");
        assert_eq!((told.method, told.object.as_str()), ("LocalTokenCreate", "token:ci"));
        assert_eq!(told.owner, "red");
        let prepared = create(None).prepare().expect("good");
        let Prepared::Create(issued, format) = &prepared else { panic!("{prepared:?}") };
        let id = format!("token:{}", issued.token.id);
        assert_eq!(prepared.recorded().expect("recorded").object, id);
        for text in [issued.text(*format), issued.token.id.clone()] {
            let told = recorded(TokenCommand::Revoke { id: text }).expect("recorded");
            assert_eq!((told.method, told.object.as_str()), ("LocalTokenRevoke", id.as_str()));
        }
        let told = recorded(TokenCommand::Revoke { id: "pvesb_secret".into() }).expect("recorded");
        assert_eq!(told.object, "");
        assert_eq!(recorded(TokenCommand::Ls), None);
    }
}
