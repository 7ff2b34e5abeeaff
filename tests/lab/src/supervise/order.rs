//! Orders to a supervisor over its unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::service::{Service, State, Status};
use crate::wire;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// Returns the states of the services.
    Status,
    /// Replaces the list of services: new ones start, changed ones restart, others end.
    Put {
        /// The whole list.
        services: Vec<Service>,
    },
    /// Starts a service, unless it runs.
    Start { name: String },
    /// Sends SIGTERM, and SIGKILL after a while; the service stays stopped.
    Stop { name: String },
    /// Sends SIGKILL; the service restarts as its definition says, unless `hold` is set.
    Kill {
        name: String,
        /// Whether to keep the service stopped.
        hold: bool,
    },
    /// Stops a service, and starts it once it has ended.
    Restart { name: String },
    /// Answers once the service has a state.
    Wait {
        name: String,
        /// State to wait for: ready or stopped.
        state: State,
        /// Longest wait in milliseconds.
        within_ms: u64,
    },
    /// Stops all services and ends the supervisor.
    End,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Reason why the order failed.
    pub error: Option<String>,
    pub services: Vec<Status>,
}

/// A supervisor, identified by its socket.
#[derive(Debug, Clone)]
pub struct Services {
    socket: PathBuf,
}

impl Services {
    /// Returns the supervisor that listens on `socket`.
    pub fn at(socket: &Path) -> Services {
        Services { socket: socket.to_owned() }
    }

    /// Returns the states of all services.
    pub fn status(&self) -> Result<Vec<Status>> {
        self.give(&Order::Status)
    }

    /// Returns the state of one service.
    pub fn status_of(&self, name: &str) -> Result<Status> {
        let all = self.status()?;
        all.into_iter()
            .find(|status| status.name == name)
            .ok_or_else(|| anyhow!("there is no service {name}"))
    }

    /// Replaces the list of services.
    pub fn put(&self, services: Vec<Service>) -> Result<Vec<Status>> {
        self.give(&Order::Put { services })
    }

    /// Starts a service and waits until it is ready.
    pub fn start(&self, name: &str, within: Duration) -> Result<()> {
        self.give(&Order::Start { name: name.to_owned() })?;
        self.wait(name, State::Ready, within)
    }

    /// Stops a service and waits until it has ended.
    pub fn stop(&self, name: &str, within: Duration) -> Result<()> {
        self.give(&Order::Stop { name: name.to_owned() })?;
        self.wait(name, State::Stopped, within)
    }

    /// Kills a service. With `hold`, waits for its end and keeps it down; otherwise its definition
    /// decides whether it restarts.
    pub fn kill(&self, name: &str, hold: bool, within: Duration) -> Result<()> {
        self.give(&Order::Kill { name: name.to_owned(), hold })?;
        if hold { self.wait(name, State::Stopped, within) } else { Ok(()) }
    }

    /// Stops a service, starts it again and waits until it is ready.
    pub fn restart(&self, name: &str, within: Duration) -> Result<()> {
        self.give(&Order::Restart { name: name.to_owned() })?;
        self.wait(name, State::Ready, within)
    }

    /// Waits until a service has a state.
    pub fn wait(&self, name: &str, state: State, within: Duration) -> Result<()> {
        let within_ms = u64::try_from(within.as_millis())?;
        let order = Order::Wait { name: name.to_owned(), state, within_ms };
        self.send(&order, within + wire::ANSWER_WITHIN).map(drop)
    }

    /// Stops all services and ends the supervisor.
    pub fn end(&self) -> Result<()> {
        self.give(&Order::End).map(drop)
    }

    fn give(&self, order: &Order) -> Result<Vec<Status>> {
        self.send(order, wire::ANSWER_WITHIN)
    }

    fn send(&self, order: &Order, within: Duration) -> Result<Vec<Status>> {
        let answer: Answer = wire::call(&self.socket, order, within)?;
        match answer.error {
            Some(error) => Err(anyhow!(error)),
            None => Ok(answer.services),
        }
    }
}
