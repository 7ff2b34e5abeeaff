//! Decides whether a request may reach an open port. Pure.
//!
//! | visibility | who gets in |
//! |---|---|
//! | public | everybody |
//! | team | a browser with a session, which a link begins |
//! | token | a request with a token, or with a session that a token began |
//! | private | nobody |

use proto::{
    name::{Port, UserLabel},
    visibility::Visibility,
};

use super::{
    question::{Question, cookie_name},
    uri::{LINK, TOKEN},
};
use crate::{
    ingress::Target,
    sandbox::access::credential::{Credential, Purpose},
};

/// Life of a session, seconds: a working day.
const SESSION_S: u64 = 12 * 3600;

/// Permission to reach a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Identity of the client, for a port that not everybody reaches.
    pub identity: Option<Identity>,
    /// Text to remove from the query, so that the sandbox does not see the credential in it.
    pub remove: Option<String>,
    /// True when the request may wake the sandbox: nobody unknown does.
    pub wakes: bool,
}

/// Identity of a client, as the sandbox is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Visibility of the port.
    pub visibility: Visibility,
    /// Label of the user that the credential was made for.
    pub user: Option<UserLabel>,
}

/// Answer that leads a browser to the URL without a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// Path and query on the same host.
    pub location: String,
    /// Value of Set-Cookie: a session. A secret.
    pub cookie: Option<String>,
}

/// Result of the decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    Granted(Grant),
    Redirected(Redirect),
    /// 401: no credential, or one that is void.
    Unauthorized(&'static str),
    /// 403: no credential helps, or not for this request.
    Forbidden(&'static str),
    /// 400: more than one credential in the query.
    Ambiguous,
    /// 204: a browser asks whether a page may send a request.
    Preflight {
        /// Origin that may, or `*`.
        allowed: String,
    },
}

const NO_SESSION: &str = "this port of the sandbox is for its team: open it by a link, which \
                          `sandboxctl link` or your application makes";
const NO_TOKEN: &str = "this port of the sandbox needs a token: send it as the header X-Sbx-Token, or \
                        open a signed URL; `sandboxctl link` makes one";
const VOID: &str = "this link or token is expired or revoked: ask for a new one";
const PRIVATE: &str = "this port of the sandbox is private: a port forward and ssh reach it, HTTP from \
                       outside does not";
const ANOTHER_PAGE: &str = "this request comes from another page, and a session counts only for the \
                            sandbox's own; an operator can name pages in ingress.parent_origins";

/// Decides for an open port; `None` when it is closed.
pub(super) fn decide(question: &Question<'_>, target: &Target, port: Port) -> Option<Access> {
    let open = target.ports.get(&port)?;
    let visitor = Visitor { question, target, port, generation: open.generation };
    Some(match open.visibility {
        Visibility::Public => visitor.enters_public(),
        Visibility::Private => Access::Forbidden(PRIVATE),
        Visibility::Team | Visibility::Token if question.is_preflight() => {
            Access::Preflight { allowed: question.allowed_origin().to_owned() }
        }
        Visibility::Team => visitor.enters_by_link(),
        Visibility::Token => visitor.enters_by_token(),
    })
}

struct Visitor<'a> {
    question: &'a Question<'a>,
    target: &'a Target,
    port: Port,
    generation: u64,
}

impl Visitor<'_> {
    fn enters_public(&self) -> Access {
        if self.question.uri().credentials() > 0 && self.question.loads_page() {
            return self.redirected(None);
        }
        self.granted(None, true)
    }

    fn enters_by_link(&self) -> Access {
        let link = self.question.uri().value(LINK);
        let Some(link) = link.filter(|_| self.question.reads() && !self.question.opens_websocket())
        else {
            return self.enters_by_session(Visibility::Team, NO_SESSION);
        };
        match self.credential(link, Purpose::Link) {
            Some(link) => self.redirected(Some(self.cookie(link.user, SESSION_S))),
            // Whoever has a session already may open an old link again.
            None if self.session().is_some() => self.redirected(None),
            None => Access::Unauthorized(VOID),
        }
    }

    fn enters_by_token(&self) -> Access {
        let in_header =
            self.question.tokens().find_map(|text| self.credential(text, Purpose::Token));
        if let Some(token) = in_header {
            let identity = Identity { visibility: Visibility::Token, user: token.user };
            return self.granted(Some(identity), true);
        }
        let in_query = self.question.uri().value(TOKEN);
        let void = in_query.is_some() || self.question.tokens().next().is_some();
        let refusal = if void { VOID } else { NO_TOKEN };
        match in_query.and_then(|text| self.credential(text, Purpose::Token)) {
            Some(token) if self.question.loads_page() => {
                let left_s = token.expires_s.saturating_sub(self.question.now_s);
                self.redirected(Some(self.cookie(token.user, left_s.min(SESSION_S))))
            }
            Some(token) => {
                let identity = Identity { visibility: Visibility::Token, user: token.user };
                self.granted(Some(identity), true)
            }
            None => self.enters_by_session(Visibility::Token, refusal),
        }
    }

    fn enters_by_session(&self, visibility: Visibility, refusal: &'static str) -> Access {
        match self.session() {
            None => Access::Unauthorized(refusal),
            Some(_) if !self.question.may_use_session() => Access::Forbidden(ANOTHER_PAGE),
            Some(session) => self.granted(Some(Identity { visibility, user: session.user }), true),
        }
    }

    fn session(&self) -> Option<Credential> {
        let mut sessions = self.question.sessions(self.port);
        sessions.find_map(|text| self.credential(text, Purpose::Session))
    }

    /// Reads a credential that opens this port now.
    fn credential(&self, text: &[u8], purpose: Purpose) -> Option<Credential> {
        let key = self.target.key.as_ref()?;
        let read = Credential::read(text, purpose, key, &self.target.id)?;
        read.is_good_for(self.port, self.generation, self.question.now_s).then_some(read)
    }

    fn granted(&self, identity: Option<Identity>, wakes: bool) -> Access {
        let uri = self.question.uri();
        let remove = uri.credential_to_remove();
        if uri.credentials() > usize::from(remove.is_some()) {
            return Access::Ambiguous;
        }
        Access::Granted(Grant { identity, remove, wakes })
    }

    fn redirected(&self, cookie: Option<String>) -> Access {
        let location = self.question.uri().without_credentials();
        Access::Redirected(Redirect { location, cookie })
    }

    /// Builds the cookie of a session of this port. A frame in a page of another site gets it too, for that page
    /// alone (`Partitioned`); no other host does.
    fn cookie(&self, user: Option<UserLabel>, life_s: u64) -> String {
        let session = Credential {
            purpose: Purpose::Session,
            port: self.port,
            generation: self.generation,
            expires_s: self.question.now_s.saturating_add(life_s),
            user,
        };
        let value = self.target.key.as_ref().map(|key| session.sign(key, &self.target.id));
        format!(
            "{}={}; Path=/; Secure; HttpOnly; SameSite=None; Partitioned; Max-Age={life_s}",
            cookie_name(self.port),
            value.unwrap_or_default(),
        )
    }
}
