//! Output for people: lines, tables, and the sentences for events. No other module prints.

pub mod output;
pub mod sentence;
pub mod table;
