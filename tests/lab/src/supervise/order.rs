//! The orders that a supervisor takes over its unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::service::{Service, State, Status};
use crate::wire;

/// An order to a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// Say how the services are.
    Status,
    /// These are the services from now on: new ones start, changed ones start again, others end.
    Put {
        /// All of them.
        services: Vec<Service>,
    },
    /// Start it, unless it runs.
    Start {
        /// Its name.
        name: String,
    },
    /// SIGTERM, SIGKILL after a while; it stays stopped.
    Stop {
        /// Its name.
        name: String,
    },
    /// SIGKILL; it is started again as its definition says, unless it is to be held.
    Kill {
        /// Its name.
        name: String,
        /// Keep it stopped.
        hold: bool,
    },
    /// Stop it, and start it once it has ended.
    Restart {
        /// Its name.
        name: String,
    },
    /// Answer once the service is so.
    Wait {
        /// Its name.
        name: String,
        /// Ready or stopped.
        state: State,
        /// How long at most.
        within_ms: u64,
    },
    /// Stop all services and end.
    End,
}

/// What a supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Why the order failed.
    pub error: Option<String>,
    /// How the services are.
    pub services: Vec<Status>,
}

/// A supervisor, by its socket.
#[derive(Debug, Clone)]
pub struct Services {
    socket: PathBuf,
}

impl Services {
    /// The supervisor that listens on `socket`.
    pub fn at(socket: &Path) -> Services {
        Services { socket: socket.to_owned() }
    }

    /// How all services are.
    pub fn status(&self) -> Result<Vec<Status>> {
        self.give(&Order::Status)
    }

    /// How one service is.
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

    /// Kills a service. Held, it is waited for and stays down; else its definition says.
    pub fn kill(&self, name: &str, hold: bool, within: Duration) -> Result<()> {
        self.give(&Order::Kill { name: name.to_owned(), hold })?;
        if hold { self.wait(name, State::Stopped, within) } else { Ok(()) }
    }

    /// Stops a service, starts it again and waits until it is ready.
    pub fn restart(&self, name: &str, within: Duration) -> Result<()> {
        self.give(&Order::Restart { name: name.to_owned() })?;
        self.wait(name, State::Ready, within)
    }

    /// Waits until a service is so.
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
