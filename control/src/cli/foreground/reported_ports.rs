//! What people have been told of each port, when it is the daemon that forwards it: its rows come in, what is news comes
//! out. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::forward_table::{ForwardRow, RowState};

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// It answers on the host.
    Open(ForwardRow),
    /// It no longer does.
    Closed(u16),
    /// It could not be opened.
    Failed(ForwardRow),
    /// It may not be.
    Denied(ForwardRow),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Last {
    Open,
    Failed(Option<String>),
}

/// What was told last.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// By the port on the host.
    ports: BTreeMap<u16, Last>,
    /// Each denied port is told once, however often its server restarts.
    denied: BTreeSet<u16>,
}

impl Told {
    /// Takes in how all ports are now.
    pub(super) fn hear(&mut self, rows: &[ForwardRow]) -> Vec<News> {
        let gone: Vec<u16> =
            self.ports.keys().copied().filter(|port| rows.iter().all(|row| row.host_port != *port)).collect();
        let mut news = Vec::new();
        for port in gone {
            if self.ports.remove(&port) == Some(Last::Open) {
                news.push(News::Closed(port));
            }
        }
        for row in rows {
            news.extend(self.hear_one(row));
        }
        news
    }

    fn hear_one(&mut self, row: &ForwardRow) -> Vec<News> {
        let port = row.host_port;
        let mut news = Vec::new();
        let next = match row.state {
            // On the way from one state to another.
            RowState::Opening | RowState::Closing => return news,
            RowState::Denied | RowState::Published => None,
            // Without a word.
            RowState::Open if row.silent => None,
            RowState::Open => Some(Last::Open),
            RowState::Failed => Some(Last::Failed(row.reason.clone())),
        };
        if row.state == RowState::Denied && self.denied.insert(row.port) {
            news.push(News::Denied(row.clone()));
        }
        let last = match &next {
            Some(next) => self.ports.insert(port, next.clone()),
            None => self.ports.remove(&port),
        };
        if last == next {
            return news;
        }
        if last == Some(Last::Open) {
            news.push(News::Closed(port));
        }
        match next {
            Some(Last::Open) => news.push(News::Open(row.clone())),
            Some(Last::Failed(_)) => news.push(News::Failed(row.clone())),
            None => {}
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::forward_table::ForwardPath;

    fn row(port: u16, state: RowState) -> ForwardRow {
        let counters = (0, 0, 0, 0);
        ForwardRow {
            port,
            host_port: port,
            state,
            path: ForwardPath::Relay,
            addresses: Vec::new(),
            reason: None,
            process: None,
            pid: None,
            label: None,
            silent: false,
            connections: counters.0,
            accepted: counters.1,
            bytes_up: counters.2,
            bytes_down: counters.3,
        }
    }

    #[test]
    fn a_port_is_told_when_it_opens_and_when_it_closes_and_not_in_between() {
        let mut told = Told::default();
        assert_eq!(told.hear(&[row(80, RowState::Opening)]), []);
        let open = row(80, RowState::Open);
        assert_eq!(told.hear(std::slice::from_ref(&open)), [News::Open(open.clone())]);
        let busy = ForwardRow { connections: 5, ..open.clone() };
        assert_eq!(told.hear(&[busy]), [], "counters are no news");
        assert_eq!(told.hear(&[row(80, RowState::Closing)]), []);
        assert_eq!(told.hear(&[]), [News::Closed(80)]);
        assert_eq!(told.hear(&[]), []);
    }

    #[test]
    fn a_failure_is_told_once_for_each_reason_and_its_end_is_an_opening() {
        let mut told = Told::default();
        let because =
            |reason: &str| ForwardRow { reason: Some(reason.to_owned()), ..row(80, RowState::Failed) };
        assert_eq!(told.hear(&[because("a")]), [News::Failed(because("a"))]);
        assert_eq!(told.hear(&[because("a")]), []);
        assert_eq!(told.hear(&[because("b")]), [News::Failed(because("b"))]);
        let open = row(80, RowState::Open);
        assert_eq!(told.hear(std::slice::from_ref(&open)), [News::Open(open.clone())]);
        assert_eq!(told.hear(&[because("b")]), [News::Closed(80), News::Failed(because("b"))]);
        assert_eq!(told.hear(&[]), [], "what never answered does not close");
    }

    #[test]
    fn a_silent_port_is_told_of_only_when_it_fails() {
        let mut told = Told::default();
        let silent = |state| ForwardRow { silent: true, ..row(80, state) };
        assert_eq!(told.hear(&[silent(RowState::Open)]), []);
        assert_eq!(told.hear(&[silent(RowState::Failed)]), [News::Failed(silent(RowState::Failed))]);
        assert_eq!(told.hear(&[silent(RowState::Open)]), []);
        assert_eq!(told.hear(&[]), []);
    }

    #[test]
    fn a_denied_port_is_told_once_however_often_its_server_restarts() {
        let mut told = Told::default();
        let denied = row(22, RowState::Denied);
        assert_eq!(told.hear(std::slice::from_ref(&denied)), [News::Denied(denied.clone())]);
        assert_eq!(told.hear(&[]), []);
        assert_eq!(told.hear(std::slice::from_ref(&denied)), []);
    }
}
